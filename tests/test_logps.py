"""grpo_loss_from_logps against the oracle, padded and packed: the numbers of grpo_loss, and ordinary autograd."""

import pytest
import torch
from loss_cases import OPTIONS, packed, packed_batch, without_logits
from oracle import oracle
from test_packed import LENGTHS, SHOWN, settings_for

from mr1fast import grpo_loss, grpo_loss_from_logps, token_logprobs
from mr1fast.kernels.self_test import random_batch

SETTINGS = [names[:-1] for names in SHOWN if names[-1] == "torch"]


def from_logits(logits, batch, **settings):
    """The loss of log-probabilities and entropies that come from the logits, with NaN where they are masked."""
    arguments = without_logits(batch) | settings
    ids, mask = arguments.pop("completion_ids"), arguments["completion_mask"]
    torch.manual_seed(0)  # clip_cov draws
    of_logits = ("temperature", "logit_scale", "final_logit_softcapping", "cu_seqlens")
    made = {name: arguments[name] for name in of_logits if name in arguments}
    logps, entropies = token_logprobs(logits, ids, mask=mask, entropy=True, backend="torch", **made)
    if mask is not None:
        logps, entropies = logps.masked_fill(~mask, torch.nan), entropies.masked_fill(~mask, torch.nan)
    return grpo_loss_from_logps(logps, entropies=entropies, **arguments)


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize(("option", "loss_type", "level"), SETTINGS)
def test_against_the_oracle(option, loss_type, level, is_packed):
    batch, flat, select = packed_batch(LENGTHS, 19, seed=len(option))
    settings = settings_for(loss_type, level) | OPTIONS[option](batch)
    if settings.get("completion_mask", True) is None:
        batch["completion_mask"] = select
        settings.pop("completion_mask")
        flat["completion_mask"] = None
    logits = batch["logits"].double().requires_grad_()
    ids, advantages = batch["completion_ids"], batch["advantages"]
    others = {name: value for name, value in batch.items() if name not in ("logits", "completion_ids", "advantages")}
    torch.manual_seed(0)
    exact = oracle(logits, ids, **({"advantages": advantages} | others | settings))
    if is_packed:
        out = from_logits(logits[select], flat, **packed(settings, select))
        exact = {name: value[select] if value is not None and value.dim() else value for name, value in exact.items()}
    else:
        out = from_logits(logits, batch, **settings)
    for name, wanted in exact.items():
        if wanted is not None and wanted.dtype != torch.bool:
            torch.testing.assert_close(getattr(out, name), wanted, rtol=1e-6, atol=1e-7)
        else:
            assert wanted is getattr(out, name) is None or torch.equal(wanted, getattr(out, name))
    (wanted,) = torch.autograd.grad(exact["loss"].sum(), logits)
    (actual,) = torch.autograd.grad(out.loss.sum(), logits)
    torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_log_probabilities_of_any_dtype(dtype):
    batch = random_batch(3, 4, 9)
    logps = token_logprobs(batch["logits"], batch["completion_ids"]).to(dtype).requires_grad_()
    arguments = {name: batch[name] for name in ("advantages", "completion_mask", "old_per_token_logps")}
    out = grpo_loss_from_logps(logps, **arguments)
    wanted = grpo_loss_from_logps(logps.detach().float(), **arguments)
    out.loss.backward()
    assert logps.grad.dtype == dtype
    assert (logps.grad[~batch["completion_mask"]] == 0).all()
    assert torch.equal(out.loss, wanted.loss)
    assert out.loss.dtype == torch.float32


def test_without_entropies():
    batch = random_batch(3, 4, 9)
    logps = torch.randn(3, 4)
    out = grpo_loss_from_logps(logps, batch["advantages"])
    assert out.entropies is None
    assert "entropy" not in out.metrics()
    with pytest.raises(ValueError, match=r"entropies must be given with entropy_coef 0.1, got None"):
        grpo_loss_from_logps(logps, batch["advantages"], entropy_coef=0.1)
    with pytest.raises(ValueError, match=r"entropies must be .* \[3, 4\], got float32 \[3\]"):
        grpo_loss_from_logps(logps, batch["advantages"], entropies=torch.zeros(3))
    with pytest.raises(ValueError, match=r"per_token_logps must be .* \[B, L\], got float32 \[12\]; packed, \[T\]"):
        grpo_loss_from_logps(logps.flatten(), batch["advantages"])


def test_banned_tokens_and_extreme_ratios():
    logps = torch.tensor([[-torch.inf, -1.0, -1000.0, -1.0]], requires_grad=True)
    old = torch.tensor([[-1.0, -torch.inf, -1.0, -1000.0]])
    out = grpo_loss_from_logps(logps, torch.ones(1), old_per_token_logps=old, ref_per_token_logps=old, beta=0.1)
    out.loss.backward()
    assert logps.grad.isfinite().all()
    assert logps.grad[0, 0] == 0


def test_differentiable_twice():
    logps = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    old, ref = (torch.randn(2, 3, dtype=torch.float64) for _ in range(2))

    def loss(logps):
        return grpo_loss_from_logps(
            logps, torch.randn(2), old_per_token_logps=old, ref_per_token_logps=ref, beta=0.5, loss_type="sapo"
        ).loss

    (first,) = torch.autograd.grad(loss(logps), logps, create_graph=True)
    first.sum().backward()
    assert logps.grad.abs().sum() > 0


def test_the_same_keywords_and_outputs_as_from_logits():
    batch = random_batch(3, 4, 9)
    settings = {"beta": 0.1, "temperature": 0.7, "importance_sampling_level": "sequence", "entropy_coef": 0.1}
    out, wanted = from_logits(batch["logits"], batch, **settings), grpo_loss(**batch, **settings)
    assert vars(out).keys() == vars(wanted).keys()
    assert out.metrics() == pytest.approx(wanted.metrics(), rel=1e-5)
