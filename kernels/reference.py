"""The definition of the loss: plain PyTorch with no hand-written derivative, selectable as `backend="torch"`.

Everything the fused kernels compute is defined here; they are tested against this file in float64. The objective is
spelled out again exactly twice, in `triton_objective.py` and in `csrc/token_loss.h`.

Sources: OThink-MR1 (arXiv 2503.16081) for the GRPO-D objective, TRL 1.16's `GRPOTrainer._compute_loss` for the other
loss types. Shapes: B completions, L tokens, V vocabulary. 16-bit logits are computed in float32, float64 in float64.

Masked tokens are replaced by harmless values *before* any arithmetic, not multiplied by zero after it: 0 * inf is NaN,
and a padded position may hold anything.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo")
SCALE_REWARDS = ("group", "batch", "none")

# float32's exp overflows at 88.7. Log-ratios are cut at 80, which leaves eight e-folds of room for what multiplies them
# (advantage, KL weight, 1 / temperature), so that no product overflows into inf and no gradient into inf * 0 = NaN.
EXP_LIMIT = 80.0
NEG_INF = float("-inf")


@dataclass(frozen=True)
class LossSpec:
    """The settings of one call that are not tensors. Field names and defaults are those of `mr1fast.grpo_loss`."""

    loss_type: str = "grpo"
    importance_sampling_level: str = "token"
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None
    use_bias_correction_kl: bool = False
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    temperature: float = 1.0


@dataclass(frozen=True)
class LossBatch:
    """The tensors of one call, checked and brought to one form. All but the logits; none needs a gradient.

    Small per-token tensors are [B, L] in the compute dtype and may be expanded views (stride 0).
    """

    ids: Tensor  # [B, L] int64
    token_weight: Tensor  # [B, L], the normaliser of each token
    beta: Tensor  # 0-d
    mask: Tensor | None = None  # [B, L] bool
    advantages: Tensor | None = None  # [B, L], or None with:
    rewards: Tensor | None = None  # [B]
    num_generations: int = 1
    scale_rewards: str = "group"
    old_logps: Tensor | None = None  # [B, L]
    ref_logps: Tensor | None = None  # [B, L]
    is_ratio: Tensor | None = None  # [B, L]
    entropy_weight: Tensor | None = None  # 0-d, entropy_coef / number of tokens


def flat(options: LossBatch | LossSpec) -> tuple:
    """The values of the fields, in order: a registered op takes no dataclass."""
    return tuple(getattr(options, name) for name in type(options).__match_args__)  # astuple would copy tensors


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def saturating_exp(x: Tensor) -> Tensor:
    """exp(min(x, EXP_LIMIT)) whose derivative is that value everywhere: cut off, but never flat and never inf.

    A flat cut would leave a token that is far from the reference without any pull back towards it.
    """
    return torch.exp(torch.where(x <= EXP_LIMIT, x, EXP_LIMIT + (x - x.detach())))


def group_advantages(rewards: Tensor, num_generations: int, scale_rewards: str, eps: float = 1e-4) -> Tensor:
    """(R - mean of its group) / (std + eps), std unbiased, over the group, the batch or not at all; NaN is absent."""
    groups = rewards.to(compute_dtype(rewards.dtype)).view(-1, num_generations)
    present = ~groups.isnan()
    values = groups.masked_fill(~present, 0)
    count = present.sum(1, keepdim=True)
    mean = values.sum(1, keepdim=True) / count.clamp(min=1)
    centred = torch.where(present, values - mean, 0)
    if scale_rewards == "none":
        return centred.flatten()
    if scale_rewards == "group":
        variance = (centred**2).sum(1, keepdim=True) / (count - 1).clamp(min=1)
    else:
        total = present.sum()
        from_batch_mean = torch.where(present, values - values.sum() / total.clamp(min=1), 0)
        variance = (from_batch_mean**2).sum() / (total - 1).clamp(min=1)
    return (centred / (variance.sqrt() + eps)).flatten()


def score(logits: Tensor, ids: Tensor, mask: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability of `ids` and entropy of each row, both [B, L], differentiable, 0 where masked.

    A banned token (logit -inf) has probability 0 and no gradient; if it is the id itself, logp is -inf, no gradient.
    Raises ValueError for an unmasked id out of range (CPU, outside of torch.compile).
    """
    check_ids(ids, mask, logits.shape[-1])
    z = logits.to(compute_dtype(logits.dtype)) / temperature
    if mask is not None:
        z = torch.where(mask[..., None], z, 0)
        ids = torch.where(mask, ids, 0)
    log_probs = torch.log_softmax(z, dim=-1)
    entropies = -(log_probs.exp() * torch.where(log_probs == NEG_INF, 0, log_probs)).sum(-1)
    logps = log_probs.gather(-1, ids[..., None]).squeeze(-1)
    logps = torch.where(logps == NEG_INF, NEG_INF, logps)
    if mask is not None:
        logps, entropies = torch.where(mask, logps, 0), torch.where(mask, entropies, 0)
    return logps, entropies


def check_ids(ids: Tensor, mask: Tensor | None, vocabulary: int) -> None:
    """ValueError for an unmasked id out of range."""
    if torch.compiler.is_compiling() or ids.is_cuda:  # there, torch's own device-side assert speaks
        return
    wrong = (ids < 0) | (ids >= vocabulary)
    if mask is not None:
        wrong = wrong & mask
    if wrong.any():
        raise ValueError(
            f"completion_ids (ids) must lie in [0, {vocabulary}) wherever the mask is set, got {int(ids[wrong][0])} "
            f"({int(wrong.sum())} such position(s))"
        )


def objective(logps: Tensor, batch: LossBatch, spec: LossSpec) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Per-token loss, KL, and the two clip flags, all [B, L] and 0 where masked; differentiable in `logps` [B, L].

    The k3 estimate of the KL, exp(d) - d - 1 with d = ref_logp - logp, grows with e^d: beyond d = 80 the exponential
    (and with it the slope) stays at e^80. It is then far beyond any use as an estimate; what matters is that loss and
    gradient stay finite and keep pulling the policy back.
    """
    keep = (lambda x: x) if batch.mask is None else (lambda x: torch.where(batch.mask, x, 0))
    dead = logps == NEG_INF
    logps = torch.where(dead, 0, logps)
    advantages = batch.advantages
    if advantages is None:
        assert batch.rewards is not None
        advantages = group_advantages(batch.rewards, batch.num_generations, batch.scale_rewards)[:, None]
        advantages = advantages.expand(logps.shape)
    advantages = keep(advantages)

    if batch.old_logps is None:
        log_ratio = logps - logps.detach()
    else:
        old = keep(batch.old_logps)
        # Finite, so that a token the old policy had banned gives a saturated ratio and not inf - inf.
        log_ratio = logps - old.clamp(min=-1e30)
        log_ratio = torch.where(dead, torch.where(old == NEG_INF, 0, NEG_INF), log_ratio)
    if spec.importance_sampling_level == "sequence":
        tokens = logps.shape[1] if batch.mask is None else batch.mask.sum(1, keepdim=True).clamp(min=1)
        log_ratio = (keep(log_ratio).sum(1, keepdim=True) / tokens).expand(logps.shape)
    ratio = saturating_exp(log_ratio)

    is_low, is_high = torch.zeros_like(dead), torch.zeros_like(dead)
    if spec.loss_type == "cispo":
        loss = -ratio.clamp(max=spec.epsilon_high).detach() * advantages * logps
        is_high = (ratio > spec.epsilon_high) & (advantages > 0)
    elif spec.loss_type == "sapo":
        t = torch.where(advantages > 0, spec.sapo_temperature_pos, spec.sapo_temperature_neg)
        loss = -torch.sigmoid(t * (ratio - 1)) * 4 / t * advantages
    else:
        low, high = 1 - spec.epsilon_low, 1 + spec.epsilon_high
        bounded = ratio if spec.delta is None else ratio.clamp(max=spec.delta)
        loss = -torch.min(bounded * advantages, ratio.clamp(low, high) * advantages)
        is_low, is_high = (bounded < low) & (advantages < 0), (bounded > high) & (advantages > 0)
    if batch.is_ratio is not None:
        loss = loss * keep(batch.is_ratio)

    kl = None
    if batch.ref_logps is not None:
        d = torch.where(dead, 0, keep(batch.ref_logps) - logps)
        kl = saturating_exp(d) - d - 1
        if spec.use_bias_correction_kl:
            kl = kl * ratio
        kl = keep(kl)
        # beta 0 switches the term off even where kl is inf (a token the reference has banned).
        loss = loss + torch.where(batch.beta == 0, 0, batch.beta * kl)
    return keep(loss), kl, keep(is_low), keep(is_high)


def token_weight(
    ids: Tensor,
    mask: Tensor | None,
    dtype: torch.dtype,
    loss_type: str,
    max_completion_length: int | None,
    num_items_in_batch: Tensor | int | None,
) -> Tensor:
    """What each token's loss is multiplied by before the sum, [B, L] (a view); token counts are at least 1."""
    B, L = ids.shape
    rows = max(B, 1)
    count: Tensor | float  # a number where it can be: small tensors cost more than they look
    if loss_type in ("grpo", "sapo"):
        count = rows * (max(L, 1) if mask is None else mask.sum(1, keepdim=True).clamp(min=1))
    elif loss_type == "luspo":
        count = rows
    elif loss_type == "dr_grpo":
        assert max_completion_length is not None
        count = rows * max_completion_length
    elif loss_type == "bnpo" or num_items_in_batch is None:
        count = token_count(ids, mask)
    elif isinstance(num_items_in_batch, Tensor):
        count = num_items_in_batch.clamp(min=1)
    else:
        count = max(num_items_in_batch, 1)
    if isinstance(count, Tensor):
        weight = count.to(dtype).reciprocal()
    else:
        weight = torch.full((), 1 / count, dtype=dtype, device=ids.device)
    return weight.expand(B, L)


def token_count(ids: Tensor, mask: Tensor | None) -> Tensor | int:
    """Number of unmasked tokens, at least 1; 0-d where there is a mask."""
    return max(ids.numel(), 1) if mask is None else mask.sum().clamp(min=1)


def aggregate(per_token_loss: Tensor, entropies: Tensor, batch: LossBatch) -> Tensor:
    """The loss, 0-d: normalised sum of the per-token losses minus the entropy bonus."""
    loss = (per_token_loss * batch.token_weight).sum()
    if batch.entropy_weight is not None:
        loss = loss - batch.entropy_weight * entropies.sum()
    return loss
