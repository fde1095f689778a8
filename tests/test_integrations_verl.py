"""mr1fast.integrations.verl, by signature and numbers; verl itself is not installed.

The numbers are restated here in float64, one token at a time, from verl 0.9.1's documentation of its options.
"""

import math

import pytest
import torch
from verl_parts import ActorConfig

from mr1fast.integrations import verl

B, L = 4, 7


@pytest.fixture
def tensors():
    g = torch.Generator().manual_seed(0)
    old = -3 * torch.rand(B, L, generator=g, dtype=torch.float64)
    mask = torch.ones(B, L, dtype=torch.bool)
    mask[0, 5:] = False
    mask[2, 1:] = False
    mask[3] = False
    return {
        "old_log_prob": old,
        "log_prob": old + 0.9 * torch.randn(B, L, generator=g, dtype=torch.float64),
        "advantages": torch.randn(B, L, generator=g, dtype=torch.float64),
        "response_mask": mask,
        "rollout_is_weights": 0.5 + torch.rand(B, L, generator=g, dtype=torch.float64),
    }


def restated(t, low, high, dual_clip, mode, *, dp_size=1, tokens=None, sequences=None, scale=None, weights=True):
    """(loss, dloss/dlog_prob, metrics) by hand."""
    mask = t["response_mask"].tolist()
    lengths = [sum(row) for row in mask]
    tokens = tokens or sum(lengths)
    sequences = sequences or sum(n > 0 for n in lengths)
    loss, gradient = 0.0, torch.zeros(B, L, dtype=torch.float64)
    clipped = bounded = kl = 0.0
    for b in range(B):
        for i in range(L):
            if not mask[b][i]:
                continue
            a = t["advantages"][b, i].item()
            difference = (t["log_prob"] - t["old_log_prob"])[b, i].item()
            log_ratio = min(max(difference, -20.0), 20.0)
            ratio = math.exp(log_ratio)
            value, slope = -a * ratio, -a * ratio if log_ratio == difference else 0.0
            is_clipped = ratio > 1 + high if a > 0 else ratio < 1 - low
            if is_clipped:
                value, slope = -a * (1 + high if a > 0 else 1 - low), 0.0
            if a < 0 and dual_clip and ratio > dual_clip:
                value, slope = -a * dual_clip, 0.0
                bounded += 1
            clipped += is_clipped
            kl -= log_ratio
            weight = t["rollout_is_weights"][b, i].item() if weights else 1.0
            weight *= dp_size
            weight *= {
                "token-mean": 1 / tokens,
                "token-sum": 1,
                "seq-mean-token-sum": 1 / sequences,
                "seq-mean-token-sum-norm": 1 / sequences / (scale or L),
                "seq-mean-token-mean": 1 / sequences / lengths[b],
            }[mode]
            loss += value * weight
            gradient[b, i] = slope * weight
    n = sum(lengths)
    metrics = {"actor/pg_clipfrac": clipped / n, "actor/ppo_kl": kl / n, "actor/pg_clipfrac_lower": bounded / n}
    return loss, gradient, metrics


def check(t, config, mode, *, tolerance=1e-12, **by_hand):
    log_prob = t["log_prob"].requires_grad_()
    loss, metrics = verl.grpo_d(**t, loss_agg_mode=mode, config=config)
    loss.backward()
    wanted, gradient, wanted_metrics = restated({k: v.detach().double() for k, v in t.items()}, **by_hand, mode=mode)
    assert loss.item() == pytest.approx(wanted, rel=tolerance, abs=tolerance)
    torch.testing.assert_close(log_prob.grad.double(), gradient, rtol=tolerance, atol=tolerance)
    assert metrics == pytest.approx(wanted_metrics, rel=max(tolerance, 1e-6))


@pytest.mark.parametrize("mode", verl.AGGREGATIONS)
def test_every_aggregation(tensors, mode):
    config = ActorConfig(clip_ratio_high=0.3)
    check(tensors, config, mode, low=0.2, high=0.3, dual_clip=3.0)


@pytest.mark.parametrize("mode", verl.AGGREGATIONS)
def test_global_batch_of_several_processes(tensors, mode):
    info = {"dp_size": 2, "batch_num_tokens": 50, "global_batch_size": 9, "loss_scale_factor": 128}
    config = ActorConfig(global_batch_info=info)
    by_hand = {"dp_size": 2, "tokens": 50, "sequences": 9, "scale": 128}
    check(tensors, config, mode, low=0.2, high=0.2, dual_clip=3.0, **by_hand)


def test_dual_clip_bites_and_can_be_left_out(tensors):
    tensors["log_prob"][0, :3] = tensors["old_log_prob"][0, :3] + 2.0
    tensors["advantages"][0, :3] = torch.tensor([-1.0, 1.0, -0.5], dtype=torch.float64)
    check(tensors, ActorConfig(), "token-mean", low=0.2, high=0.2, dual_clip=3.0)
    assert verl.grpo_d(**tensors, config=ActorConfig())[1]["actor/pg_clipfrac_lower"] > 0
    tensors["log_prob"] = tensors["log_prob"].detach()
    check(tensors, ActorConfig(clip_ratio_c=None), "token-mean", low=0.2, high=0.2, dual_clip=None)


@pytest.mark.parametrize("dual_clip", [1.05, 1.2, 3.0])
def test_any_dual_clip_above_1_and_extreme_ratios(tensors, dual_clip):
    """Also within the clipped range, where the bound alone counts, and beyond the log-ratio's of verl."""
    tensors["log_prob"][1] = tensors["old_log_prob"][1] + torch.tensor([30.0, 25, 19.9, 0.1, -0.1, -25, -30]).double()
    for sign in (1, -1):
        tensors["log_prob"] = tensors["log_prob"].detach()
        tensors["advantages"][1] = sign * tensors["advantages"][1].abs()
        config = ActorConfig(clip_ratio_c=dual_clip, clip_ratio_high=0.3)
        check(tensors, config, "token-mean", low=0.2, high=0.3, dual_clip=dual_clip)


# ---- verl's other losses, restated in torch from the formulas in its core_algos.py ----------------------------------

EPSILONS = {"clip_ratio": 0.2, "clip_ratio_low": 0.15, "clip_ratio_high": 0.25}
LOW, HIGH = 0.15, 0.25


def gspo(lp, old, A, mask):
    mean = ((lp - old) * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    ratio = (lp - lp.detach() + mean.detach()).clamp(max=10).exp()
    return torch.maximum(-A * ratio, -A * ratio.clamp(1 - LOW, 1 + HIGH))


def sapo(lp, old, A, mask):
    tau = torch.where(A > 0, 1.0, 1.3)
    return -torch.sigmoid(tau * ((lp - old).exp() - 1)) * 4 / tau * A


def cispo(lp, old, A, mask):
    return -(lp - old).exp().clamp(1 - LOW, 1 + HIGH).detach() * A * lp


def dppo_tv(lp, old, A, mask):
    moved = lp.exp() - old.exp()
    kept = torch.where(A > 0, moved <= HIGH, moved >= -LOW)
    return -A * (lp - old).exp().clamp(max=1.5).detach() * lp * kept


def dppo_kl(lp, old, A, mask):
    p, q = lp.exp(), old.exp()
    kl = q * (old - lp) + (1 - q) * torch.log((1 - q + 1e-8) / (1 - p + 1e-8))
    kept = torch.where(A > 0, (kl <= HIGH) | (p <= q), (kl <= LOW) | (p >= q))
    return -A * (lp - old).exp().clamp(max=1.5).detach() * lp * kept


def covariances(lp, A, mask):
    n = mask.sum()
    return (A - (A * mask).sum() / n) * (lp - (lp * mask).sum() / n).detach()


def clip_cov(lp, old, A, mask):
    ratio, cov = (lp - old).exp(), covariances(lp, A, mask)
    one, two = -A * ratio, -A * ratio.clamp(1 - LOW, 1 + HIGH)
    drawn = ((cov > -3) & (cov < 5) & mask & ~(two > one)).nonzero()
    assert len(drawn) > 2, "one that is not drawn"
    drawn = drawn[torch.randperm(len(drawn))[: int(0.2 * mask.sum())]]
    kept = torch.ones_like(A)
    kept[drawn[:, 0], drawn[:, 1]] = 0
    return torch.maximum(one, two) * kept


def kl_cov(lp, old, A, mask):
    cov = covariances(lp, A, mask).masked_fill(~mask, -math.inf).flatten()
    penalty = torch.zeros_like(cov)
    penalty[cov.topk(int(0.3 * mask.sum())).indices] = 0.7
    return -A * (lp - old).exp() + penalty.view_as(A) * (lp - old).abs()


@pytest.mark.parametrize("terms", [gspo, sapo, cispo, dppo_tv, dppo_kl, clip_cov, kl_cov], ids=lambda f: f.__name__)
def test_other_objectives(tensors, terms):
    tensors["log_prob"] = tensors["log_prob"].clamp(max=-0.01)
    policy_loss = {"objective": terms.__name__, "ppo_kl_coef": 0.7, "kl_cov_ratio": 0.3, "clip_cov_ratio": 0.2}
    config = EPSILONS | {"policy_loss": policy_loss | {"clip_cov_lb": -3.0}, "clip_ratio_c": 1.5, "tau_neg": 1.3}
    log_prob = tensors["log_prob"].requires_grad_()
    mask, mode = tensors["response_mask"], "seq-mean-token-mean" if terms is sapo else "token-mean"
    torch.manual_seed(0)
    per_token = terms(log_prob, tensors["old_log_prob"], tensors["advantages"], mask) * tensors["rollout_is_weights"]
    wanted = (per_token * mask).sum() / mask.sum()
    if terms is sapo:  # verl's recommendation is all that verl has for it
        wanted = ((per_token * mask).sum(1) / mask.sum(1).clamp(min=1)).sum() / (mask.sum(1) > 0).sum()
    torch.manual_seed(0)
    loss, metrics = verl.grpo_d(**tensors, config=config)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-12)
    gradients = (torch.autograd.grad(value, log_prob)[0] for value in (loss, wanted))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
    assert set(metrics) == {"actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"}
    if terms in (cispo, dppo_tv, dppo_kl, clip_cov, gspo):
        assert 0 < metrics["actor/pg_clipfrac"] < 1
    assert verl.grpo_d(**tensors, loss_agg_mode=mode, config=config)[0].isfinite()


def test_geo_mean(tensors):
    log_prob, old, weights = (tensors[name] for name in ("log_prob", "old_log_prob", "rollout_is_weights"))
    mask = tensors["response_mask"]
    A = tensors["advantages"] = tensors["advantages"][:, :1].expand(B, L)
    log_prob.requires_grad_()
    d = log_prob - old
    clipped = torch.where(A > 0, d.clamp(max=HIGH), d.clamp(min=-LOW))
    n = mask.sum(1) + 1e-8
    ratio, weight = ((((x * mask).sum(1)) / n).exp() for x in (clipped, (weights + 1e-10).log()))
    wanted = (-((A * mask).sum(1) / n) * ratio * weight).mean()
    loss, metrics = verl.grpo_d(**tensors, config=EPSILONS | {"policy_loss": {"objective": "geo_mean"}})
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-7)
    gradients = (torch.autograd.grad(value, log_prob)[0] for value in (loss, wanted))
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-9)
    outside = ((d > HIGH) | (d < -LOW)) & mask
    assert metrics["actor/pg_clipfrac"] == pytest.approx((outside & (A > 0)).sum().item() / mask.sum().item())
    assert metrics["actor/pg_clipfrac_lower"] == pytest.approx((outside & (A < 0)).sum().item() / mask.sum().item())


def test_without_config_and_as_a_mapping(tensors):
    tensors["rollout_is_weights"] = None
    loss, metrics = verl.grpo_d(*(tensors[k] for k in ("old_log_prob", "log_prob", "advantages", "response_mask")))
    wanted, _, wanted_metrics = restated(tensors, 0.2, 0.2, None, "token-mean", weights=False)
    assert loss.item() == pytest.approx(wanted, rel=1e-12)
    assert metrics == pytest.approx(wanted_metrics, rel=1e-6)
    mapping = {"clip_ratio": 0.1, "clip_ratio_low": None, "clip_ratio_high": 0.4}
    loss, _ = verl.grpo_d(**tensors, config=mapping)
    # What a mapping leaves out has verl's default, which is 3 for the dual clip.
    assert loss.item() == pytest.approx(restated(tensors, 0.1, 0.4, 3.0, "token-mean", weights=False)[0], rel=1e-12)
    loss, _ = verl.grpo_d(**tensors, config={**mapping, "clip_ratio_c": None})
    assert loss.item() == pytest.approx(restated(tensors, 0.1, 0.4, None, "token-mean", weights=False)[0], rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_dtypes_and_per_completion_weights(tensors, dtype):
    t = {k: v if v.dtype == torch.bool else v.to(dtype) for k, v in tensors.items()}
    t["advantages"] = t["advantages"][:, :1].expand(B, L)
    t["rollout_is_weights"] = t["rollout_is_weights"][:, :1]
    log_prob = t["log_prob"].requires_grad_()
    loss, _ = verl.grpo_d(**t, config=ActorConfig())
    assert loss.dtype == torch.float32
    loss.backward()
    assert log_prob.grad.dtype == dtype
    double = {k: v.detach().double().expand(B, L) if v.dtype != torch.bool else v for k, v in t.items()}
    wanted, gradient, _ = restated(double, 0.2, 0.2, 3.0, "token-mean")
    assert loss.item() == pytest.approx(wanted, rel=1e-5)
    torch.testing.assert_close(
        log_prob.grad.double(), gradient, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6
    )


def test_what_stands_at_masked_positions_does_not_matter(tensors):
    clean = {k: v.clone() for k, v in tensors.items()}
    padding = ~tensors["response_mask"]
    for name, bad in (("old_log_prob", -math.inf), ("log_prob", math.nan), ("rollout_is_weights", math.inf)):
        tensors[name][padding] = bad
    log_prob = tensors["log_prob"].requires_grad_()
    loss, metrics = verl.grpo_d(**tensors, loss_agg_mode="seq-mean-token-mean")
    loss.backward()
    wanted, wanted_metrics = verl.grpo_d(**clean, loss_agg_mode="seq-mean-token-mean")
    assert loss.item() == wanted.item()
    assert metrics == wanted_metrics
    assert (log_prob.grad[padding] == 0).all()
    nothing = {**clean, "response_mask": torch.zeros(B, L, dtype=torch.bool)}
    assert all(verl.grpo_d(**nothing, loss_agg_mode=mode)[0].item() == 0 for mode in verl.AGGREGATIONS)


def test_bad_arguments_are_named(tensors):
    with pytest.raises(ValueError, match=r"loss_agg_mode .*did you mean 'token-mean'"):
        verl.grpo_d(**tensors, loss_agg_mode="token-meen")
    with pytest.raises(ValueError, match=r"batch_num_tokens must be given .* dp_size 2"):
        verl.grpo_d(**tensors, config=ActorConfig(global_batch_info={"dp_size": 2}))
    with pytest.raises(ValueError, match="global_batch_size must be given"):
        verl.grpo_d(**tensors, loss_agg_mode="seq-mean-token-sum", config={"global_batch_info": {"dp_size": 2}})
    with pytest.raises(ValueError, match=r"clip_ratio_c must be a finite number > 1, got 1.0"):
        verl.grpo_d(**tensors, config=ActorConfig(clip_ratio_c=1.0))


def test_linear_cross_entropy_is_verls_by_shape_and_numbers():
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 6, 5, generator=g).requires_grad_()
    weight = torch.randn(11, 5, generator=g).requires_grad_()
    labels = torch.randint(11, (1, 6), generator=g)
    logps, entropies = verl.linear_cross_entropy(hidden, weight, labels, 0.7, "none")
    leaves = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    wanted = (leaves[0][0] @ leaves[1].T / 0.7).log_softmax(-1)
    torch.testing.assert_close(logps.double(), wanted[range(6), labels[0]], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropies.double(), -(wanted.exp() * wanted).sum(-1), rtol=1e-6, atol=1e-6)
    (logps.sum() + 0.3 * entropies.sum()).backward()
    (wanted[range(6), labels[0]].sum() - 0.3 * (wanted.exp() * wanted).sum()).backward()
    for ours, theirs in zip((hidden, weight), leaves):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="reduction must be one of none, got 'mean'"):
        verl.linear_cross_entropy(hidden, weight, labels, 0.7, "mean")
