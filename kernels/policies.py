"""The policy terms of single tokens, part of the definition in `reference.py`.

Each is spelled out again, together with its derivative, in `triton_objective.py` and in `csrc/token_loss.h`. Those that
look at more than one token are in `batchwise.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mr1fast.kernels.exponentials import NEG_INF

if TYPE_CHECKING:
    from mr1fast.kernels.completions import Completions


class PolicyInput(NamedTuple):
    """What a policy term is made of: tensors [B, L], harmless where masked."""

    ratio: Tensor  # new probability over old one, at the importance sampling level
    log_ratio: Tensor  # of each token by itself; -inf where the token is banned now
    advantages: Tensor
    logps: Tensor  # 0 where the token is banned now
    old_logps: Tensor
    dead: Tensor  # bool, whether the token is banned now
    mask: Tensor | None  # bool, the tokens that an average is over
    completions: Completions


# A policy term, and where it is clipped from below and from above, all [B, L].
Term = tuple[Tensor, Tensor, Tensor]
# The second argument is a LossSpec, whose epsilons may be tensors [B, L].
Policy = Callable[[PolicyInput, Any], Term]


def clip(x: PolicyInput, spec: Any) -> Term:
    """PPO's term: -min(ratio A, clip(ratio) A).

    delta bounds the unclipped ratio from above (TRL, INTELLECT-2). clip_ratio_c bounds the ratio where the advantage is
    negative, and so the term by -clip_ratio_c A (dual clip, arXiv 1912.09729; verl).
    """
    low, high = 1 - spec.epsilon_low, 1 + spec.epsilon_high
    ratio, A = torch.where((x.ratio > spec.clip_ratio_c) & (x.advantages < 0), spec.clip_ratio_c, x.ratio), x.advantages
    bounded = ratio.clamp(max=spec.delta)
    loss = -torch.min(bounded * A, ratio.clamp(low, high) * A)
    return loss, (bounded < low) & (A < 0), (bounded > high) & (A > 0)


def cispo(x: PolicyInput, spec: Any) -> Term:
    """MiniMax-M1's term (arXiv 2506.13585): REINFORCE weighted by the ratio, which epsilon_high itself bounds (TRL)."""
    loss = -x.ratio.clamp(max=spec.epsilon_high).detach() * x.advantages * x.logps
    return loss, nowhere(x.ratio), (x.ratio > spec.epsilon_high) & (x.advantages > 0)


def cispo_two_sided(x: PolicyInput, spec: Any) -> Term:
    """CISPO whose weight is the ratio clipped as PPO's, to [1 - epsilon_low, 1 + epsilon_high] (verl, EasyR1)."""
    low, high = 1 - spec.epsilon_low, 1 + spec.epsilon_high
    loss = -x.ratio.clamp(low, high).detach() * x.advantages * x.logps
    return loss, x.ratio < low, x.ratio > high


def sapo(x: PolicyInput, spec: Any) -> Term:
    """Qwen's term (arXiv 2511.20347): instead of the clip, a sigmoid that has slope 1 at ratio 1."""
    t = torch.where(x.advantages > 0, spec.sapo_temperature_pos, spec.sapo_temperature_neg)
    loss = -torch.sigmoid(t * (x.ratio - 1)) * 4 / t * x.advantages
    return loss, nowhere(x.ratio), nowhere(x.ratio)


def dppo_tv(x: PolicyInput, spec: Any) -> Term:
    """DPPO's term (arXiv 2602.04879) by the total variation of sampling this token or another one (verl, prime-rl)."""
    difference = _probabilities(x) - x.old_logps.exp()
    return _dppo(x, difference > spec.epsilon_high, difference < -spec.epsilon_low, spec)


def dppo_kl(x: PolicyInput, spec: Any) -> Term:
    """DPPO's term by the KL, from the old policy to the new one, of sampling this token or another one (verl)."""
    p, old_p = _probabilities(x), x.old_logps.exp()
    logps = torch.where(x.dead, NEG_INF, x.logps.detach())
    rest, old_rest = (-torch.expm1(log).clamp(max=0) + 1e-8 for log in (logps, x.old_logps))
    kl = old_p * (x.old_logps - logps) + (1 - old_p) * torch.log(old_rest / rest)
    return _dppo(x, (kl > spec.epsilon_high) & (p > old_p), (kl > spec.epsilon_low) & (p < old_p), spec)


def _probabilities(x: PolicyInput) -> Tensor:
    return torch.where(x.dead, 0, x.logps.detach().exp())


def _dppo(x: PolicyInput, above: Tensor, below: Tensor, spec: Any) -> Term:
    """REINFORCE weighted by the ratio, which clip_ratio_c bounds, without the tokens that have moved too far already.

    above, below: whether a token has moved too far up or down; the advantage says which of the two counts.
    """
    is_positive = x.advantages > 0
    is_high, is_low = above & is_positive, below & ~is_positive
    loss = -x.ratio.clamp(max=spec.clip_ratio_c).detach() * x.advantages * x.logps
    return loss * ~(is_low | is_high), is_low, is_high


def nowhere(like: Tensor) -> Tensor:
    return torch.zeros_like(like, dtype=torch.bool)


# In the order of their numbers in Triton and C++.
POLICIES: tuple[Policy, ...] = (clip, cispo, sapo, cispo_two_sided, dppo_tv, dppo_kl)
