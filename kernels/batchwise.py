"""The policy terms and masks that need all tokens of a completion, or of the batch, part of the definition.

What a token's gradient is depends on the log-probabilities of others, which no pass over single rows of logits knows.
So they are ordinary torch on log-probabilities, the second of two passes, and have no spelling in Triton or C++.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mr1fast.kernels.completions import Completions
from mr1fast.kernels.exponentials import NEG_INF, saturating_exp
from mr1fast.kernels.policies import PolicyInput, Term, clip, nowhere

if TYPE_CHECKING:
    from mr1fast.kernels.reference import BatchwiseSpec

# ---- policy terms ---------------------------------------------------------------------------------------------------


def gmpo(x: PolicyInput, spec: Any) -> Term:
    """GMPO's term (arXiv 2507.20673): -A times the geometric mean of a completion's clipped ratios (TRL; verl's
    geo_mean). The epsilons bound the log-ratio, on the side to which the advantage pushes.
    """
    is_positive = x.advantages > 0
    low, high = x.log_ratio < -spec.epsilon_low, x.log_ratio > spec.epsilon_high
    # Not by clamp(), which would give a NaN the gradient 0.
    clipped = torch.where(
        is_positive,
        torch.where(high, spec.epsilon_high, x.log_ratio),
        torch.where(low, -spec.epsilon_low, x.log_ratio),
    )
    ratio = saturating_exp(completion_means(clipped, x.mask, x.completions))
    return -ratio * x.advantages, low & (x.advantages < 0), high & is_positive


def clip_cov(x: PolicyInput, spec: Any) -> Term:
    """PPO's term without a few tokens, drawn by torch's CPU generator among those whose covariance is high: in them the
    entropy falls fastest (arXiv 2505.22617, verl). The flags show these tokens.
    """
    loss, is_low, is_high = clip(x, spec)
    counted, covariance = _covariances(x)
    is_candidate = (covariance > spec.clip_cov_lb) & (covariance < spec.clip_cov_ub) & counted & ~is_low & ~is_high
    candidates = is_candidate.nonzero()
    most = max(int(spec.clip_cov_ratio * int(counted.sum())), 1)
    drawn = candidates[torch.randperm(len(candidates))[:most].to(candidates.device)]
    cut = nowhere(loss)
    cut[drawn[:, 0], drawn[:, 1]] = True
    return torch.where(cut, 0, loss), cut & (x.advantages <= 0), cut & (x.advantages > 0)


def kl_cov(x: PolicyInput, spec: Any) -> Term:
    """-A ratio, unclipped, and for the tokens of the highest covariance also ppo_kl_coef |log-ratio| (arXiv 2505.22617,
    verl).
    """
    counted, covariance = _covariances(x)
    tokens = int(counted.sum())
    most = min(max(int(spec.kl_cov_ratio * tokens), 1), tokens)
    highest = covariance.masked_fill(~counted, NEG_INF).flatten().topk(most).indices
    is_highest = nowhere(covariance).flatten().index_fill(0, highest, True).view_as(covariance)
    penalty = spec.ppo_kl_coef * torch.where(x.dead, 0, x.log_ratio).abs()
    loss = -x.advantages * x.ratio + torch.where(is_highest, penalty, 0)
    return loss, nowhere(loss), nowhere(loss)


def _covariances(x: PolicyInput) -> tuple[Tensor, Tensor]:
    """Which tokens count, and for each of them what it adds to the covariance of advantage and log-probability."""
    counted = ~x.dead if x.mask is None else x.mask & ~x.dead
    tokens = counted.sum().clamp(min=1)

    def centred(values: Tensor) -> Tensor:
        return values - torch.where(counted, values, 0).sum() / tokens

    return counted, centred(x.advantages) * centred(x.logps.detach())


def completion_means(values: Tensor, mask: Tensor | None, completions: Completions) -> Tensor:
    """The mean of values [B, L] over the unmasked tokens of each completion, for each of its tokens [B, L]."""
    unmasked = values if mask is None else torch.where(mask, values, 0)
    total = completions.spread(completions.sums(unmasked))
    return (total / completions.tokens(mask)).to(values.dtype).expand(values.shape)


# ---- masks of the policy term ---------------------------------------------------------------------------------------


def high_entropy(entropies: Tensor, mask: Tensor | None, quantile: float) -> Tensor:
    """The share `quantile` of the unmasked tokens with the highest entropies, bool [B, L] (arXiv 2506.01939, TRL)."""
    counted = entropies.detach().flatten() if mask is None else entropies.detach()[mask]
    if not counted.numel():
        return nowhere(entropies)
    is_high = entropies.detach() >= counted.quantile(1 - quantile)
    return is_high if mask is None else is_high & mask


def near_policy(x: PolicyInput, mask: Tensor | None, spec: BatchwiseSpec) -> Tensor:
    """All but the completions that have a negative advantage and are off-policy: where the mean of sampling_logp - logp
    is above the threshold (DeepSeek-V3.2, arXiv 2512.02556, TRL). Bool [B, L].
    """
    drift = -x.log_ratio.detach()
    if spec.sampling_logps is not None:
        drift = spec.sampling_logps - torch.where(x.dead, NEG_INF, x.logps.detach())
    drift = torch.where(drift.isnan(), 0, drift)  # as where the sampling engine could not score a token
    return (x.advantages >= 0) | (completion_means(drift, mask, x.completions) <= spec.off_policy_mask_threshold)
