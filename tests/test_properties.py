"""Properties of the loss that hold for any input, searched by hypothesis."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mr1fast import grpo_loss
from mr1fast.kernels.loss_types import LOSS_TYPES
from mr1fast.kernels.self_test import available_backends, random_batch

PER_TOKEN_MEAN = ("bnpo", "dapo", "cispo")  # the number of completions plays no part in these


def cases(loss_types=LOSS_TYPES):
    return st.fixed_dictionaries(
        {
            "shape": st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(2, 70)),
            "seed": st.integers(0, 10**6),
            "loss_type": st.sampled_from(loss_types),
            "beta": st.sampled_from([0.0, 0.04, 1.0]),
        }
    )


# Triton takes a second for a case, to interpret it or to compile another V; the matrix in test_loss.py covers it.
BACKENDS = pytest.mark.parametrize("backend", [name for name in available_backends() if name != "triton"])
SEARCH = settings(max_examples=25, deadline=None)


def prepare(case):
    batch = random_batch(*case["shape"], seed=case["seed"])
    keywords = {"loss_type": case["loss_type"], "beta": case["beta"], "max_completion_length": case["shape"][1]}
    return batch, keywords


def loss_and_gradient(batch, **keywords):
    logits = batch["logits"].clone().requires_grad_()
    torch.manual_seed(0)  # clip_cov draws
    output = grpo_loss(**(batch | {"logits": logits} | keywords))
    output.loss.backward()
    return output, logits.grad


@BACKENDS
# Not of those that take the tokens of the largest covariance: two tokens have the same one, and rounding chooses.
@given(cases([name for name in LOSS_TYPES if not name.endswith("_cov")]), st.floats(-30, 30))
@SEARCH
def test_shifting_a_row_changes_nothing(backend, case, shift):
    batch, keywords = prepare(case)
    output, gradient = loss_and_gradient(batch, backend=backend, **keywords)
    batch["logits"] = batch["logits"] + shift
    shifted, shifted_gradient = loss_and_gradient(batch, backend=backend, **keywords)
    torch.testing.assert_close(shifted.loss, output.loss, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(shifted_gradient, gradient, rtol=1e-2, atol=1e-4)


@BACKENDS
@given(cases())
@example({"shape": (1, 1, 2), "seed": 25477, "loss_type": "grpo", "beta": 1.0})
@SEARCH
def test_gradient_sums_to_zero_over_the_vocabulary(backend, case):
    """But for the rounding of its terms, c (1[j = id] - p_j) and those of the entropy bonus.

    Where the sampled token has nearly all the probability the gradient is far smaller than its terms, c and c p.
    """
    batch, keywords = prepare(case)
    _, without_bonus = loss_and_gradient(batch, backend=backend, **keywords)
    logps = batch["logits"].double().log_softmax(-1).gather(-1, batch["completion_ids"][..., None])[..., 0]
    c = without_bonus.double().abs().sum(-1) / (-2 * torch.expm1(logps))  # the absolute values add up to 2 c (1 - p)
    coef = 0.1
    _, gradient = loss_and_gradient(batch, backend=backend, entropy_coef=coef, **keywords)
    terms = c.max().item() + coef * (1 + math.log(case["shape"][2]))
    assert gradient.double().sum(-1).abs().max().item() < 1e-6 * terms


@BACKENDS
@given(cases(), st.integers(1, 3))
@SEARCH
def test_masking_equals_deletion(backend, case, extra):
    """Masked tokens appended to every completion change nothing."""
    batch, keywords = prepare(case)
    output, gradient = loss_and_gradient(batch, backend=backend, **keywords)
    padded = {}
    for name, value in batch.items():
        padding = (
            torch.full((value.shape[0], extra, *value.shape[2:]), 7, dtype=value.dtype) if value.dim() > 1 else None
        )
        padded[name] = value if padding is None else torch.cat([value, padding], 1)
    padded["completion_mask"][:, -extra:] = False
    longer, longer_gradient = loss_and_gradient(padded, backend=backend, **keywords)
    torch.testing.assert_close(longer.loss, output.loss)
    torch.testing.assert_close(longer_gradient[:, :-extra], gradient)
    assert (longer_gradient[:, -extra:] == 0).all()


@BACKENDS
@given(cases(PER_TOKEN_MEAN), st.integers(0, 4))
@SEARCH
def test_a_masked_completion_equals_none(backend, case, at):
    batch, keywords = prepare(case)
    output, gradient = loss_and_gradient(batch, backend=backend, **keywords)
    at = min(at, len(batch["logits"]))
    more = {name: torch.cat([value[:at], value[:1], value[at:]]) for name, value in batch.items()}
    more["completion_mask"][at] = False
    longer, longer_gradient = loss_and_gradient(more, backend=backend, **keywords)
    torch.testing.assert_close(longer.loss, output.loss)
    assert (longer_gradient[at] == 0).all()
    torch.testing.assert_close(torch.cat([longer_gradient[:at], longer_gradient[at + 1 :]]), gradient)


@BACKENDS
@given(cases([name for name in LOSS_TYPES if name != "kl_cov"]))  # its own KL term has no weight beta
@SEARCH
def test_zero_advantage_and_zero_beta_give_no_gradient(backend, case):
    batch, keywords = prepare(case)
    batch["advantages"] = torch.zeros_like(batch["advantages"])
    _, gradient = loss_and_gradient(batch, backend=backend, **(keywords | {"beta": 0.0}))
    assert (gradient == 0).all()


@BACKENDS
@given(cases(PER_TOKEN_MEAN))
@SEARCH
def test_the_mean_over_tokens_of_the_unreduced_loss(backend, case):
    batch, keywords = prepare(case)
    mean, gradient = loss_and_gradient(batch, backend=backend, **keywords)
    logits = batch["logits"].clone().requires_grad_()
    none = grpo_loss(**(batch | {"logits": logits}), reduction="none", backend=backend, **keywords)
    total = none.loss.sum() / batch["completion_mask"].sum().clamp(min=1)
    total.backward()
    torch.testing.assert_close(total, mean.loss, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(logits.grad, gradient, rtol=1e-3, atol=1e-6)
