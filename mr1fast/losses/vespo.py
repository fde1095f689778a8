"""VESPO's weights. With them the loss is CISPO's, so that no kernel needs to know of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mr1fast.checks import number
from mr1fast.losses.arguments import token_mask
from mr1fast.losses.layout import layout_of

_LOWEST, _HIGHEST = math.log(1e-8), 20.0  # of log w, as in TRL


@torch.no_grad()
def vespo_weights(
    per_token_logps: Tensor,
    old_per_token_logps: Tensor | None,
    advantages: Tensor,
    *,
    completion_mask: Tensor | None = None,
    importance_sampling_ratio: Tensor | None = None,
    k_pos: float = 2.0,
    lambda_pos: float = 3.0,
    k_neg: float = 3.0,
    lambda_neg: float = 2.0,
) -> Tensor:
    """The weight phi(w) = e^lambda w^k e^(-lambda w) of each completion in VESPO, as TRL 1.16 defines it.

    w is the probability of a completion's unmasked tokens over what it was when it was sampled; phi(1) = 1. VESPO's
    loss is -phi A log pi, whose normaliser is dapo's; phi has no gradient:

    >>> phi = vespo_weights(logps, old_logps, advantages, completion_mask=mask)
    >>> settings = {"loss_type": "cispo", "epsilon_high": 1.0}  # whose own ratio is 1 without old log-probabilities
    >>> grpo_loss(logits, ids, advantages, completion_mask=mask, importance_sampling_ratio=phi, **settings)

    Args:
        per_token_logps: [B, L], of the policy that is trained, as `token_logprobs` gives them.
        old_per_token_logps: [B, L], or None for a policy that has not changed since.
        advantages: [B].
        completion_mask: [B, L]; None for all ones.
        importance_sampling_ratio: [B], [B, 1] or [B, L] (then of every position, 1 where masked), the correction for a
            rollout engine, by which w is multiplied.
        k_pos, lambda_pos, k_neg, lambda_neg: shape and rate for advantages >= 0 and for the others.

    Returns:
        [B], float32 (float64 for float64); 0 where phi is not a finite number.

    Raises:
        ValueError: a bad argument, by name.
    """
    logps, layout = layout_of("per_token_logps", per_token_logps)
    for name, value in {"k_pos": k_pos, "lambda_pos": lambda_pos, "k_neg": k_neg, "lambda_neg": lambda_neg}.items():
        number(name, value)
    mask = token_mask(completion_mask, layout, "completion_mask")
    log_w = torch.zeros_like(logps[:, 0] if logps.shape[1] else logps.sum(1))
    if old_per_token_logps is not None:
        log_ratio = (logps - layout.per_token("old_per_token_logps", old_per_token_logps)).clamp(-20, 20)
        log_w = (log_ratio if mask is None else torch.where(mask, log_ratio, 0)).sum(1)
    if importance_sampling_ratio is not None:
        correction = importance_sampling_ratio.to(log_w.dtype).log().clamp(_LOWEST, _HIGHEST)
        log_w = log_w + (correction if correction.dim() == 1 else correction.sum(1))
    log_w = log_w.clamp(_LOWEST, _HIGHEST)
    is_positive = layout.per_completion("advantages", advantages) >= 0
    k, rate = torch.where(is_positive, k_pos, k_neg), torch.where(is_positive, lambda_pos, lambda_neg).clamp(min=1e-4)
    return (rate + k * log_w - rate * log_w.exp()).exp().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).to(log_w.dtype)
