"""Corrections for a rollout engine whose probabilities are not quite those of the policy that is trained."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mr1fast.checks import choice, number
from mr1fast.kernels.exponentials import EXP_LIMIT
from mr1fast.kernels.reference import compute_dtype
from mr1fast.losses.arguments import token_mask
from mr1fast.losses.layout import layout_of

MODES = ("tis", "mis", "icepop", "seq-mask-tis")


@torch.no_grad()
def rollout_correction(
    per_token_logps: Tensor,
    rollout_logps: Tensor,
    *,
    mode: str = "tis",
    level: str = "token",
    cap: float | tuple[float, float] = 2.0,
    completion_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Weights w = exp(per_token_logps - rollout_logps), bounded, for the loss's `importance_sampling_ratio`.

    >>> ratio, kept, metrics = rollout_correction(old_logps, rollout_logps, completion_mask=mask)
    >>> grpo_loss(..., old_per_token_logps=old_logps, importance_sampling_ratio=ratio, completion_mask=mask)

    Args:
        per_token_logps: [B, L] (packed [T] or [1, T]), of the trained policy as it was when the completions were
            sampled, that is the old log-probabilities.
        rollout_logps: likewise, as the engine that sampled reports them; where one is NaN (missing) the weight is 1.
        mode:
            "tis": w is cut to the bounds (TRL's *_truncate, verl's rollout_is, NeMo-RL's tis).
            "mis": w is 0 outside of the bounds (TRL's *_mask).
            "icepop": likewise, with a lower bound (1 / cap if none is given; NeMo-RL, OpenRLHF).
            "seq-mask-tis": all of a completion is 0 where the geometric mean of its w is outside of the bounds, lower
            bound as for icepop; other weights stay as they are (NeMo-RL, OpenRLHF). A geometric mean is near 1:
            NeMo-RL's bounds are (0.999, 1.002), the default lets nearly everything through.
        level: "token", or "sequence": one w for each completion, the product of those of its tokens.
        cap: the upper bound, or (lower bound, upper bound).
        completion_mask: like per_token_logps; None for all ones.
        cu_seqlens: [S + 1] if packed, see `grpo_loss`.

    Returns:
        (importance_sampling_ratio, completion_mask, metrics). The ratio is float32 [B, L] (packed [T]), 0 where masked.
        The mask, bool, leaves out what the ratio sets to 0: pass it to the loss if such tokens shall not count at all
        (neither in the KL nor in the normalisers, verl's rejection), or keep your own (TRL, NeMo-RL). The metrics are
        floats, over unmasked tokens: "mean", "min" and "max" of the ratio, "effective_sample_size" (a share: 1 if all
        weights are equal), "cut_share" of tokens whose w is outside of the bounds, and "logp_difference", the mean of
        |per_token_logps - rollout_logps|; all under "rollout_correction/".

    Raises:
        ValueError: a bad argument, by name.

    NeMo-RL (`ClippedPGLossFn`) differs where a log-probability is missing or infinite: w is 0 there, and counts as 1 in
    the geometric mean. Here w is 1 where it is missing, and outside of the bounds where it is infinite. NeMo-RL has no
    default for the lower bound of icepop and seq-mask-tis, and its `is_oob_ratio` counts completions for the latter.
    """
    choice("mode", mode, MODES)
    choice("level", level, ("token", "sequence"))
    if mode == "seq-mask-tis" and level == "sequence":
        raise ValueError("level must be 'token' with mode='seq-mask-tis', which looks at whole completions by itself")
    low, high = _bounds(cap, mode)
    logps, layout = layout_of("per_token_logps", per_token_logps, cu_seqlens=cu_seqlens)
    mask = token_mask(completion_mask, layout, "completion_mask")
    mask = torch.ones(layout.shape, dtype=torch.bool, device=layout.device) if mask is None else mask
    dtype, completions = compute_dtype(logps.dtype), layout.completions

    rollout = layout.per_token("rollout_logps", rollout_logps).to(dtype)
    same = rollout.isnan() | (logps == rollout)  # both may be -inf
    log_ratio = torch.where(mask & ~same, logps.to(dtype) - rollout.clamp(min=-1e30), 0)
    bounded = log_ratio
    if level == "sequence" or mode == "seq-mask-tis":
        bounded = completions.spread(completions.sums(log_ratio)).to(dtype)
        if mode == "seq-mask-tis":
            bounded = bounded / completions.tokens(mask)
    bounded = _exp(bounded).expand(layout.shape)
    cut = mask & ((bounded < low) | (bounded > high))
    ratio = _exp(log_ratio) if mode == "seq-mask-tis" else bounded
    ratio = ratio.clamp(low, high) if mode == "tis" else ratio.masked_fill(cut, 0)
    ratio = ratio.masked_fill(~mask, 0)
    kept = mask if mode == "tis" else mask & ~cut
    return layout.returned(ratio), layout.returned(kept), _metrics(ratio, mask, cut, log_ratio)


def _exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(max=EXP_LIMIT).exp()


def _bounds(cap: Any, mode: str) -> tuple[float, float]:
    if isinstance(cap, tuple | list):
        if len(cap) != 2:
            raise ValueError(f"cap must be the upper bound, or (lower bound, upper bound), got {cap!r}")
        low, high = number("cap", cap[0], at_least=0), number("cap", cap[1], above=0)
    else:
        high = number("cap", cap, above=0)
        low = 1 / high if mode in ("icepop", "seq-mask-tis") else 0.0
    if low > high:
        raise ValueError(f"cap must have its lower bound below its upper bound, got ({low}, {high})")
    return low, high


def _metrics(ratio: Tensor, mask: Tensor, cut: Tensor, log_ratio: Tensor) -> dict[str, float]:
    """See `rollout_correction`; reads the values of the tensors once."""
    tokens, total, squares = mask.sum().clamp(min=1), ratio.double().sum(), ratio.double().square().sum()
    inside = torch.where(mask, ratio, math.inf), torch.where(mask, ratio, 0)
    values = {
        "mean": total / tokens,
        "min": inside[0].min() if ratio.numel() else total,
        "max": inside[1].max() if ratio.numel() else total,
        "effective_sample_size": torch.where(squares > 0, total.square() / (tokens * squares), 0),
        "cut_share": cut.sum() / tokens,
        "logp_difference": log_ratio.abs().sum() / tokens,
    }
    numbers = torch.stack([value.double() for value in values.values()]).tolist()
    return {f"rollout_correction/{name}": value for name, value in zip(values, numbers)}
