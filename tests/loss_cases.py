"""The ways in which grpo_loss can be called, and how a backend is held to the float64 oracle in each of them."""

import torch
from oracle import oracle

from mr1fast import grpo_loss
from mr1fast.kernels import cuda
from mr1fast.kernels.loss_types import ONE_PASS_LOSS_TYPES
from mr1fast.kernels.reference import LogitMap, LossSpec
from mr1fast.kernels.self_test import GRADIENT_FLOOR, assert_within_budget, device_of, random_batch

# One loss type for each policy term, which is all that a kernel knows of it: the others differ in a normaliser.
DISTINCT = tuple({LossSpec(loss_type=name).policy: name for name in reversed(ONE_PASS_LOSS_TYPES)}.values())[::-1]
PER_TOKEN = ("per_token_logps", "entropies", "kl")
FLAGS = ("is_low_clipped", "is_high_clipped")

# Settings with which a loss type has something to clip, choose or cut in a `random_batch`.
OF_LOSS_TYPE = {
    "dr_grpo": {"max_completion_length": 7},
    "cispo": {"epsilon_high": 1.1},
    "dppo_tv": {"epsilon_low": 0.01, "epsilon_high": 0.02},
    "dppo_kl": {"epsilon_low": 0.002, "epsilon_high": 0.001, "clip_ratio_c": 1.2},
    "clip_cov": {"clip_cov_ratio": 0.1, "clip_cov_lb": 0.1},
    "kl_cov": {"kl_cov_ratio": 0.3},
}

# Each option stands for one way in which the call can differ from the plain on-policy one.
OPTIONS = {
    "on_policy": lambda batch: {"old_per_token_logps": None, "ref_per_token_logps": None, "beta": 0.0},
    "old_and_ref": lambda batch: {"beta": 0.1},
    "beta_tensor": lambda batch: {"beta": torch.tensor(0.04), "temperature": 0.7},
    "beta_zero_with_ref": lambda batch: {"beta": 0.0},
    "no_mask": lambda batch: {"beta": 0.1, "completion_mask": None},
    "delta": lambda batch: {"beta": 0.1, "delta": 1.3, "epsilon_high": 0.28},
    "small_delta": lambda batch: {"beta": 0.1, "delta": 0.9},
    "dual_clip": lambda batch: {"beta": 0.1, "clip_ratio_c": 1.25, "epsilon_high": 0.4, "delta": 1.3},
    "bias_correction": lambda batch: {"beta": 0.1, "use_bias_correction_kl": True, "delta": 1.3},
    "is_ratio_per_token": lambda batch: {"beta": 0.1, "importance_sampling_ratio": batch["old_per_token_logps"].exp()},
    "is_ratio_per_completion": lambda batch: {
        "beta": 0.1,
        "importance_sampling_ratio": torch.rand(len(batch["logits"]), 1),
    },
    "entropy": lambda batch: {"beta": 0.1, "entropy_coef": 0.3, "temperature": 1.3},
    "entropy_cost": lambda batch: {"beta": 0.1, "entropy_coef": -0.3},
    "rewards": lambda batch: {"beta": 0.1, "advantages": None, "num_generations": 3, "rewards": REWARDS},
    "rewards_batch": lambda batch: {
        "advantages": None,
        "num_generations": 3,
        "rewards": REWARDS,
        "scale_rewards": "batch",
    },
    "rewards_none": lambda batch: {
        "advantages": None,
        "num_generations": 2,
        "rewards": REWARDS,
        "scale_rewards": "none",
    },
    "token_advantages": lambda batch: {"beta": 0.1, "advantages": torch.randn(batch["logits"].shape[:2])},
    "beta_per_completion": lambda batch: {"beta": torch.linspace(0, 0.3, len(batch["logits"]))},
    "beta_per_token": lambda batch: {"beta": _per_token(batch, 0.2), "use_bias_correction_kl": True},
    "epsilon_per_completion": lambda batch: {
        "epsilon_low": torch.linspace(0.1, 0.3, len(batch["logits"])),
        "epsilon_high": torch.linspace(0.9, 1.2, len(batch["logits"])),
    },
    "epsilon_per_token": lambda batch: {"beta": 0.1, "epsilon_low": _per_token(batch, 0.4)},
    "token_weight": lambda batch: {"beta": 0.1, "token_weight": _per_token(batch, 2.0), "entropy_coef": 0.1},
    "is_ratio_vector": lambda batch: {"importance_sampling_ratio": torch.linspace(0.5, 2, len(batch["logits"]))},
    "logit_scale": lambda batch: {"beta": 0.1, "logit_scale": 0.25, "temperature": 0.7},
    "softcap": lambda batch: {"beta": 0.1, "final_logit_softcapping": 3.0, "temperature": 0.7, "logit_scale": 2.0},
    "softcap_entropy": lambda batch: {"final_logit_softcapping": 3.0, "entropy_coef": 0.3},
    "temperature_per_completion": lambda batch: {
        "beta": 0.1,
        "temperature": torch.linspace(0.5, 1.5, len(batch["logits"])),
        "logit_scale": 1.5,
    },
    "temperature_per_token": lambda batch: {
        "entropy_coef": 0.1,
        "temperature": _per_token(batch, 2.0) + 0.5,
        "final_logit_softcapping": 5.0,
    },
    "num_sequences": lambda batch: {"beta": 0.1, "num_sequences": 9},
    "num_sequences_tensor": lambda batch: {"num_sequences": torch.tensor(3.5)},
    "sum": lambda batch: {"beta": 0.1, "reduction": "sum", "entropy_coef": 0.1},
    "weighted_none": lambda batch: {"beta": 0.1, "reduction": "none", "token_weight": _per_token(batch, 2.0)},
    "k1": lambda batch: {"beta": 0.1, "kl_estimator": "k1"},
    "abs": lambda batch: {"beta": 0.1, "kl_estimator": "abs", "use_bias_correction_kl": True},
    "k2": lambda batch: {"beta": 0.1, "kl_estimator": "k2", "kl_clamp": 0.3},
    "k3_clamp": lambda batch: {"beta": 0.1, "kl_clamp": 0.3, "use_bias_correction_kl": True},
    "low_var_kl": lambda batch: {
        "beta": 0.1,
        "kl_estimator": "low_var_kl",
        "ref_per_token_logps": batch["ref_per_token_logps"] * 3,
    },
    "num_items": lambda batch: {"beta": 0.1, "num_items_in_batch": torch.tensor(29)},
    "high_entropy": lambda batch: {"beta": 0.1, "entropy_coef": 0.1, "top_entropy_quantile": 0.4},
    "high_entropy_sum": lambda batch: {"entropy_coef": 0.1, "top_entropy_quantile": 0.4, "reduction": "sum"},
    "near_policy": lambda batch: {
        "beta": 0.1,
        "old_per_token_logps": batch["old_per_token_logps"] + 0.2,
        "off_policy_mask_threshold": 0.1,
    },
    "near_sampling": lambda batch: {
        "old_per_token_logps": None,
        "sampling_per_token_logps": _sampled(batch),
        "off_policy_mask_threshold": 0.1,
    },
}

# What a policy term has to do with, and what a normaliser, or an objective of all tokens at once.
OF_POLICY = ("on_policy", "old_and_ref", "dual_clip", "is_ratio_per_token", "epsilon_per_token", "token_advantages")
OF_NORMALISER = (
    "num_items",
    "num_sequences_tensor",
    "no_mask",
    "token_weight",
    "rewards",
    "high_entropy",
    "near_policy",
)
# What the scoring has to do with, which is all that a kernel does of an objective in two passes.
OF_SCORING = (
    "old_and_ref",
    "beta_tensor",
    "no_mask",
    "entropy",
    "logit_scale",
    "softcap",
    "softcap_entropy",
    "temperature_per_completion",
    "temperature_per_token",
)
# Beside PPO's term, the others run on a kernel with the options that they have to do with.
OF_KERNELS = [(option, name) for option in OPTIONS for name in DISTINCT if name == "grpo" or option in OF_POLICY]


def _per_token(batch, scale):
    """Numbers between 0 and scale, [B, L], of which a quarter is 0; NaN where they must not be looked at."""
    shape = batch["logits"].shape[:2]
    values = (torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 4 - 1).clamp(min=0) * scale / 3
    return values if batch["completion_mask"] is None else values.masked_fill(~batch["completion_mask"], torch.nan)


def _sampled(batch):
    """Log-probabilities of another engine, [B, L], which could not score one of the tokens."""
    sampled = batch["old_per_token_logps"] + 0.3 * torch.randn(len(batch["logits"]), 1)
    sampled[0, 0] = torch.nan
    return sampled


REWARDS = torch.tensor([1.0, 0.0, 0.5, float("nan"), 1.0, 0.0])


def without_logits(batch):
    return {name: value for name, value in batch.items() if name != "logits"}


def on(device, batch):
    """A dict with its tensors on that device."""
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def run(function, logits, batch, *, backend=None, **settings):
    """(outputs as a dict, gradient), both on the CPU, of `function` on a leaf copy of the logits.

    Without a backend it runs on the CPU and is not told of any, as suits the oracle.
    """
    device = "cpu" if backend is None else device_of(backend)
    keywords = on(device, without_logits(batch) | settings | ({} if backend is None else {"backend": backend}))
    logits = logits.detach().clone().to(device).requires_grad_()
    torch.manual_seed(0)  # clip_cov draws
    ids, advantages = keywords.pop("completion_ids"), keywords.pop("advantages")
    output = function(logits, ids, advantages, **keywords)
    output = output if isinstance(output, dict) else vars(output)
    output["loss"].sum().backward()
    return on("cpu", output), logits.grad.cpu()


def cuda_path(logits):
    """The kernel that backend="cuda" takes for the one pass on these logits, in place."""
    call = cuda._Call(logits, torch.zeros(logits.shape[:2], dtype=torch.int64), None, LogitMap(), logits)
    return cuda._library(logits).mr1_grpo_path(call.c).decode()


def packing(lengths):
    """Where [B, L] holds a token of the packed form, and cu_seqlens, for completions of these lengths."""
    lengths = torch.tensor(lengths)
    return torch.arange(int(lengths.max())) < lengths[:, None], torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


def packed(values, select):
    """The values with what is [B, L, ...] in them as [T, ...]."""

    def one(value):
        if not isinstance(value, torch.Tensor) or value.dim() < 2:
            return value
        return value[select] if value.shape[:2] == select.shape else value.squeeze(1)

    return {name: one(value) for name, value in values.items()}


def packed_batch(lengths, V, *, seed=0, **keywords):
    """(padded batch, packed batch, the tokens of [B, L] that are in the latter), with holes in both masks."""
    select, cu_seqlens = packing(lengths)
    batch = random_batch(*select.shape, V, seed=seed, **keywords)
    holes = torch.rand(select.shape, generator=torch.Generator().manual_seed(seed)) < 0.2
    batch["completion_mask"] = select & ~holes
    return batch, packed(batch, select) | {"cu_seqlens": cu_seqlens}, select


def check(batch, backend, **settings):
    """Hold the backend to the error budget; the oracle and torch in the same dtype run on the CPU."""
    exact, exact_gradient = run(oracle, batch["logits"].double(), batch, **settings)
    compare(batch, backend, exact, exact_gradient, **settings)


def check_packed(lengths, V, backend, option=lambda batch: {}, *, dtype=torch.float32, **settings):
    """The packed form against the oracle on the padded one."""
    batch, flat, select = packed_batch(lengths, V, seed=len(lengths), dtype=dtype)
    settings |= option(batch)
    if settings.get("completion_mask", True) is None:
        batch["completion_mask"], flat["completion_mask"] = select, None
        settings.pop("completion_mask")
    exact, exact_gradient = run(oracle, batch["logits"].double(), batch, **settings)
    exact = {name: value[select] if value is not None and value.dim() else value for name, value in exact.items()}
    compare(flat, backend, exact, exact_gradient[select], **packed(settings, select))


def assert_exact_in_float64(batch, exact, exact_gradient, **settings):
    """The budget of `compare` is twice torch's own error, so that a wrong formula in torch would not show there.

    Not to the last bits of float64: they are up to 2e-6 apart, mostly with sapo, presumably as settings become float32.
    """
    actual, gradient = run(grpo_loss, batch["logits"].double(), batch, backend="torch", **settings)
    torch.testing.assert_close(actual["loss"], exact["loss"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradient, exact_gradient, rtol=1e-5, atol=1e-7)


def compare(batch, backend, exact, exact_gradient, *, gradient_floor=0.0, **settings):
    """Hold outputs and gradient of the backend to the error budget around the exact ones.

    gradient_floor: of the gradient's budget, relative to its largest entry, where that is more than the usual one.
    """
    logits = batch["logits"]
    peer, peer_gradient = run(grpo_loss, logits, batch, backend="torch", **settings)
    if backend == "torch":
        actual, gradient = peer, peer_gradient
        assert_exact_in_float64(batch, exact, exact_gradient, **settings)
    else:
        actual, gradient = run(grpo_loss, logits, batch, backend=backend, **settings)
    assert gradient.dtype == logits.dtype
    assert actual["loss"].dtype == torch.float32
    assert_within_budget("loss", actual["loss"], exact["loss"], peer["loss"], 2e-6)
    for name in PER_TOKEN:
        if exact[name] is None:
            assert actual[name] is None
        else:
            assert actual[name].dtype == torch.float32
            assert not actual[name].requires_grad
            assert_within_budget(name, actual[name], exact[name], peer[name], 5e-6)
    for name in FLAGS:
        assert torch.equal(actual[name], exact[name]), name
    scale = exact_gradient.abs().max().clamp(min=1e-30)
    floor = max(GRADIENT_FLOOR[logits.dtype], gradient_floor)
    assert_within_budget("gradient", gradient / scale, exact_gradient / scale, peer_gradient / scale, floor)
    mask = batch["completion_mask"] if "completion_mask" not in settings else settings["completion_mask"]
    if mask is not None:
        assert (gradient[~mask] == 0).all()
