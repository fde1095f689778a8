"""Whatever tensors come: the loss of the float64 oracle, or a ValueError; never a crash, nor another loss elsewhere."""

import math
import warnings

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from loss_cases import OF_LOSS_TYPE, OPTIONS, compare, packed, packing, run
from oracle import oracle

from mr1fast import (
    group_advantages,
    grpo_loss,
    grpo_loss_from_logps,
    linear_grpo_loss,
    linear_token_logprobs,
    rollout_correction,
    token_logprobs,
)
from mr1fast.kernels.loss_types import LOSS_TYPES, ONE_PASS_LOSS_TYPES
from mr1fast.kernels.self_test import available_backends, random_batch
from tests.fuzzing import at_once, cases

BACKENDS = [name for name in available_backends() if name != "triton"]
SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 6), st.sampled_from([1, 2, 3, 7, 8, 16, 17, 40]))
JUNK = (math.nan, math.inf, -math.inf, 1e38, 0.0)


def spoilt(batch, junk):
    """The batch with junk wherever the mask is not set."""
    hidden = ~batch["completion_mask"]
    for name in ("logits", "old_per_token_logps", "ref_per_token_logps"):
        batch[name][hidden] = junk
    batch["completion_ids"][hidden] = -100
    batch["old_per_token_logps"].clamp_(max=0.0)
    return batch


@given(
    SHAPES,
    st.integers(0, 10**6),
    st.sampled_from(ONE_PASS_LOSS_TYPES),
    st.sampled_from(sorted(OPTIONS)),
    st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from(JUNK),
    st.sampled_from(BACKENDS),
    st.booleans(),
)
@cases(12)
def test_the_loss_is_that_of_the_oracle_whatever_is_masked(shape, seed, loss_type, option, dtype, junk, backend, flat):
    assume(not option.startswith(("rewards", "no_mask")))  # for groups of a size, and without a mask
    torch.manual_seed(seed)
    batch = spoilt(random_batch(*shape, seed=seed, dtype=dtype), junk)
    settings = {"loss_type": loss_type, **OF_LOSS_TYPE.get(loss_type, {}), **OPTIONS[option](batch)}
    settings = {name: value for name, value in settings.items() if not (flat and name == "importance_sampling_ratio")}
    if (old := settings.get("old_per_token_logps")) is not None:
        settings["old_per_token_logps"] = old.clamp(max=0.0)  # of probabilities, which the objectives of dppo need
    with at_once():
        exact, exact_gradient = run(oracle, batch["logits"].double(), batch, **settings)
    range_of = torch.finfo(dtype)  # 0, too small or too large a gradient: no rounding can be measured by it
    largest = exact_gradient.abs().max().item()
    assume(range_of.tiny < largest < range_of.max)
    rounding = rounding_of_certainty(batch, exact, exact_gradient, **settings) / largest
    if flat:
        select, cu_seqlens = packing([shape[1]] * shape[0])
        exact = {name: value[select] if value is not None and value.dim() else value for name, value in exact.items()}
        batch, settings = packed(batch, select) | {"cu_seqlens": cu_seqlens}, packed(settings, select)
        exact_gradient = exact_gradient[select]
    compare(batch, backend, exact, exact_gradient, gradient_floor=rounding, **settings)


def rounding_of_certainty(batch, exact, exact_gradient, *, temperature=1.0, logit_scale=1.0, **_):
    """How far the gradient may be off where a token is all but certain.

    The logit x and the log-sum-exp m have a relative error of 2^-24 each, in float32, which 1 - p = 1 - exp(x - m)
    has as an absolute one.
    """
    temperature = torch.as_tensor(temperature).double()
    x = batch["logits"].double() * logit_scale / temperature.reshape(*temperature.shape, *[1] * (3 - temperature.dim()))
    largest = x[batch["completion_mask"]].abs().max().item()
    uncertainty = -torch.expm1(exact["per_token_logps"].double()).clamp(max=-1e-30)
    rate = exact_gradient.abs().sum(-1) / (2 * uncertainty)  # of each token, which 1 - p is multiplied by
    return 2**-23 * largest * rate.max().item()


def laid_out(tensor, how):
    """The same values with other strides."""
    if how == "transposed" and tensor.dim() > 1:
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if how == "sliced":
        wide = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 3), 99)
        wide[..., 1:-2] = tensor
        return wide[..., 1:-2]
    if how == "every second" and tensor.dim() > 1:
        wide = tensor.new_full((2 * tensor.shape[0], *tensor.shape[1:]), 99)
        wide[::2] = tensor
        return wide[::2]
    return tensor


LAYOUTS = st.sampled_from(["plain", "transposed", "sliced", "every second"])


@pytest.mark.parametrize("backend", BACKENDS)
@given(SHAPES, st.integers(0, 10**6), st.sampled_from(LOSS_TYPES), st.lists(LAYOUTS, min_size=5, max_size=5))
@cases(8)
def test_strides_and_the_kind_of_mask_and_ids_change_nothing(backend, shape, seed, loss_type, layouts):
    batch = random_batch(*shape, seed=seed)
    settings = {"loss_type": loss_type, "beta": 0.1, **OF_LOSS_TYPE.get(loss_type, {})}
    plain, gradient = run(grpo_loss, batch["logits"], batch, backend=backend, **settings)
    other = {name: laid_out(tensor, how) for (name, tensor), how in zip(batch.items(), layouts + ["plain"])}
    other["completion_mask"] = other["completion_mask"].to([torch.int64, torch.float32, torch.uint8][seed % 3])
    other["completion_ids"] = other["completion_ids"].to([torch.int32, torch.int64][seed % 2])
    logits = other.pop("logits").detach().requires_grad_()
    torch.manual_seed(0)
    output = grpo_loss(
        logits, other.pop("completion_ids"), other.pop("advantages"), backend=backend, **other, **settings
    )
    output.loss.backward()
    torch.testing.assert_close(output.loss, plain["loss"])
    torch.testing.assert_close(logits.grad, gradient)


# ---- arguments that are wrong, or odd -------------------------------------------------------------------------------

DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64,
torch.int32, torch.uint8,
                          torch.bool, torch.complex64])  # fmt: skip
VALUES = st.sampled_from([0, 1, -1, 2, 3, 5, 100, -100, 0.5, 1e30, math.nan, math.inf, -math.inf])
SIZES = st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7]), max_size=4)


@st.composite
def tensors(draw):
    shape, dtype = draw(SIZES), draw(DTYPES)
    values = draw(st.lists(VALUES, min_size=1, max_size=4))
    integers = not (dtype.is_floating_point or dtype.is_complex)
    flat = [int(value) if math.isfinite(value) and abs(value) < 200 else 7 for value in values] if integers else values
    flat = [abs(value) for value in flat] if dtype == torch.uint8 else flat
    tensor = torch.tensor(flat).to(dtype).repeat(math.prod(shape) // len(flat) + 1)[: math.prod(shape)].reshape(shape)
    how = draw(st.sampled_from(["plain", "plain", "transposed", "sliced", "every second", "expanded", "grad"]))
    if how == "grad" and tensor.is_floating_point():
        return tensor.requires_grad_()
    if how == "expanded" and tensor.numel():
        return tensor.flatten()[0].expand(shape)
    return laid_out(tensor, how) if tensor.dim() and tensor.numel() and dtype != torch.bool else tensor


ODD = st.one_of(
    tensors(),
    tensors(),
    VALUES,
    st.sampled_from([None, True, "sum", "none", "sequence", "k2", [1.0, 2.0], 10**30, 10**400, -(10**5000)]),
)
B, L, V, H = 3, 4, 7, 5


def usual(function):
    """Arguments with which each function works."""
    batch = random_batch(B, L, V, seed=1)
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(*shape, generator=generator) for shape in ((B, L, H), (V, H)))
    ids, mask = batch["completion_ids"], batch["completion_mask"]
    per_token = {name: batch[name] for name in ("old_per_token_logps", "ref_per_token_logps")}
    objective = {
        **per_token, "advantages": batch["advantages"], "completion_mask": mask, "beta": 0.1,
        "loss_type": "grpo", "delta": None,
        "epsilon_low": 0.2, "epsilon_high": 0.2, "num_items_in_batch": None, "num_sequences": None,
        "token_weight": None,
        "importance_sampling_ratio": None, "reduction": "mean", "entropy_coef": 0.0, "cu_seqlens": None,
        "rewards": None,
        "num_generations": None, "kl_clamp": None, "importance_sampling_level": "token", "kl_estimator": "k3",
    }  # fmt: skip
    logit_map = {"temperature": 1.0}
    return {
        grpo_loss: {"logits": batch["logits"], "completion_ids": ids, **objective, **logit_map, "logit_scale": 1.0,
                    "final_logit_softcapping": None},
        linear_grpo_loss: {"hidden": hidden, "lm_head_weight": weight, "completion_ids": ids, "lm_head_bias": None,
                           "chunk_bytes": None, **objective, **logit_map},
        token_logprobs: {"logits": batch["logits"], "ids": ids, "mask": mask, **logit_map, "entropy": False},
        linear_token_logprobs: {"hidden": hidden, "lm_head_weight": weight, "ids": ids, "mask": mask, **logit_map},
        grpo_loss_from_logps: {"per_token_logps": per_token["old_per_token_logps"], "entropies": None, **objective},
        rollout_correction: {"per_token_logps": per_token["old_per_token_logps"], "rollout_logps":
                             per_token["ref_per_token_logps"], "mode": "tis", "level": "token", "cap": 2.0,
                             "completion_mask": mask, "cu_seqlens": None},
        group_advantages: {"rewards": batch["advantages"], "num_generations": 3, "scale_rewards": "group", "eps": 1e-4},
    }[function]  # fmt: skip


FUNCTIONS = [grpo_loss, linear_grpo_loss, token_logprobs, linear_token_logprobs, grpo_loss_from_logps,
rollout_correction,
             group_advantages]  # fmt: skip


def tensors_in(output):
    """Its tensors in order, gradients aside."""
    if isinstance(output, torch.Tensor):
        return [output.detach()]
    if isinstance(output, tuple | list):
        return [tensor for one in output for tensor in tensors_in(one)]
    return [tensor for one in vars(output).values() for tensor in tensors_in(one)] if hasattr(output, "loss") else []


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
@given(data=st.data())
@cases(8)
def test_odd_arguments_are_an_error_or_the_same_on_every_backend(function, data):
    arguments = usual(function)
    for name in data.draw(st.lists(st.sampled_from(sorted(arguments)), min_size=1, max_size=2, unique=True)):
        arguments[name] = data.draw(ODD, label=name)
    backends = BACKENDS if function not in (grpo_loss_from_logps, rollout_correction, group_advantages) else [None]
    outcomes = []
    for backend in backends:
        with at_once(), warnings.catch_warnings():
            warnings.simplefilter("error")  # such as one about complex numbers cast to real ones
            try:
                torch.manual_seed(0)
                chosen = {} if backend is None else {"backend": backend}
                outcomes.append(tensors_in(function(**arguments, **chosen)))
            except ValueError as error:
                assert 10 < len(str(error)) < 2000
                outcomes.append(None)
    if "float64" in str([getattr(value, "dtype", None) for value in arguments.values()]):
        return  # which torch alone computes in
    for other in outcomes[1:]:
        assert (other is None) == (outcomes[0] is None)
        for one, two in zip(outcomes[0] or [], other or []):
            torch.testing.assert_close(two, one, equal_nan=True, rtol=2e-3, atol=2e-3, check_dtype=False)
