"""The estimators of the KL where the reference is far off, and against the formulas of the trainers that name them."""

import pytest
import torch
from loss_cases import on, run, without_logits

from mr1fast import grpo_loss, grpo_loss_from_logps
from mr1fast.kernels.reference import KL_ESTIMATORS
from mr1fast.kernels.self_test import device_of, every_backend, random_batch

BACKENDS = every_backend()
INF = float("inf")
# ref_logp - logp; none of them is 10 or 80, where a formula changes.
FAR = torch.tensor([-INF, -200.0, -25.0, -11.5, -4.0, -0.1, 0.0, 0.1, 2.0, 3.0, 4.0, 25.0, 79.0])


def verl(logps, ref, kind):
    """verl 0.9.1's core_algos.kl_penalty_forward; EasyR1's compute_kl has the same formulas."""
    d = ref - logps
    if kind == "low_var_kl":
        d = torch.clamp(d, min=-20, max=20)
        return torch.clamp(torch.exp(d) - d - 1, min=-10, max=10)
    return {"k1": -d, "abs": d.abs(), "k2": 0.5 * d.square()}[kind]


def openrlhf(logps, ref, kind):
    """OpenRLHF's compute_approx_kl: every estimate is cut at 10."""
    log_ratio = logps - ref
    if kind == "k2":
        log_ratio = log_ratio**2 / 2.0
    elif kind == "low_var_kl":
        log_ratio = -log_ratio
        log_ratio = log_ratio.exp() - 1 - log_ratio
    return log_ratio.clamp(min=-10, max=10)


CLAMP_AT_10 = {"k1": 10.0, "k2": 20**0.5, "low_var_kl": None}  # kl_clamp for OpenRLHF's cut


@pytest.mark.parametrize(
    ("formula", "kind", "clamp"),
    [
        *((verl, kind, None) for kind in ("k1", "abs", "k2", "low_var_kl")),
        *((openrlhf, *c) for c in CLAMP_AT_10.items()),
    ],
)
def test_as_the_trainers_define_them(formula, kind, clamp):
    logps = torch.linspace(-3, 0, 13, dtype=torch.float64)[None].requires_grad_()
    ref = logps.detach() + FAR.double().clamp(min=-200)
    settings = {"ref_per_token_logps": ref, "beta": 1.0, "kl_estimator": kind, "kl_clamp": clamp}
    out = grpo_loss_from_logps(logps, torch.zeros(1), loss_type="bnpo", **settings)
    wanted = formula(logps, ref, kind)
    torch.testing.assert_close(out.kl, wanted.detach())
    (actual,) = torch.autograd.grad(out.loss, logps)
    (exact,) = torch.autograd.grad(wanted.mean(), logps)
    torch.testing.assert_close(actual, exact)


def test_a_reference_four_nats_off():
    """What EasyR1 gives for it, and what the unbounded k3 does."""
    logps, ref = torch.zeros(1, 1), torch.full((1, 1), 4.0)
    arguments = {"advantages": torch.zeros(1), "ref_per_token_logps": ref, "beta": 0.1}
    assert grpo_loss_from_logps(logps, kl_estimator="low_var_kl", **arguments).loss.item() == pytest.approx(1.0)
    assert grpo_loss_from_logps(logps, **arguments).loss.item() == pytest.approx(0.1 * (torch.tensor(4.0).exp() - 5))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("clamp", [None, 5.0])
@pytest.mark.parametrize("kind", KL_ESTIMATORS)
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "torch"])
def test_far_off_in_a_kernel(kind, clamp, bias, backend):
    """Value and gradient of each token as the reference has them, where they are finite; and no NaN anywhere."""
    batch = random_batch(1, len(FAR), 11, seed=3) | {"completion_mask": None}
    plain = grpo_loss(**batch)
    batch["ref_per_token_logps"] = plain.per_token_logps + FAR
    settings = {"beta": 0.1, "kl_estimator": kind, "kl_clamp": clamp, "use_bias_correction_kl": bias}
    wanted, exact = run(grpo_loss, batch["logits"], batch, backend="torch", **settings)
    actual, gradient = run(grpo_loss, batch["logits"], batch, backend=backend, **settings)
    torch.testing.assert_close(actual["kl"], wanted["kl"], rtol=2e-5, atol=2e-6)
    rows = exact.isfinite().all(-1)
    if bias:  # the slope of k3 is then a difference of exponentials, which float32 cannot hold far off
        rows &= wanted["kl"][0].abs() < 1e3
    torch.testing.assert_close(gradient[rows], exact[rows], rtol=1e-4, atol=1e-5)
    if clamp is not None or kind == "low_var_kl":
        assert gradient.isfinite().all()
        assert actual["loss"].isfinite()


@pytest.mark.parametrize("kind", KL_ESTIMATORS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_never_hidden(kind, backend):
    batch = random_batch(2, 3, 11) | {"completion_mask": None}
    batch["ref_per_token_logps"][0, 1] = torch.nan
    settings = {"beta": 0.1, "kl_estimator": kind, "kl_clamp": 5.0}
    out, gradient = run(grpo_loss, batch["logits"], batch, backend=backend, **settings)
    assert out["loss"].isnan()
    assert out["kl"].isnan().sum() == 1
    if kind not in ("k1", "abs"):  # whose slope is 1 or -1, whatever the reference
        assert gradient[0, 1].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_beta_may_be_0_for_some(backend):
    """Where it is, an infinite KL is reported and counts for nothing."""
    batch = random_batch(3, 4, 11) | {"completion_mask": None}
    batch["ref_per_token_logps"][1] = -INF
    device = device_of(backend)
    arguments = on(device, without_logits(batch))
    logits = batch["logits"].to(device).requires_grad_()
    out = grpo_loss(logits, **arguments, beta=torch.tensor([0.1, 0.0, 0.1], device=device), backend=backend)
    out.loss.backward()
    assert out.loss.isfinite()
    assert out.kl[1].isinf().all()
    assert logits.grad.isfinite().all()
