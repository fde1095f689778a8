"""The definition of the loss: plain PyTorch with no hand-written derivative, selectable as `backend="torch"`.

Everything the fused kernels compute is defined here, and they are tested against this file in float64. The loss of one
token is written out in two more places together with its derivative: `triton_objective.py` and `csrc/token_loss.h`.

Sources: OThink-MR1 (arXiv 2503.16081) for the GRPO-D objective, TRL 1.16's `GRPOTrainer._compute_loss` for the other
loss types. Shapes: B completions, L tokens, V vocabulary; S packed completions of T tokens in all are [1, T], and
cu_seqlens says where each begins. 16-bit logits are computed in float32, float64 in float64.

Masked tokens are replaced by harmless values *before* any arithmetic, not multiplied by zero after it: 0 * inf is NaN,
and a padded position may hold anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mr1fast.kernels import normalisers
from mr1fast.kernels.advantages import group_advantages
from mr1fast.kernels.completions import Completions
from mr1fast.kernels.normalisers import Tokens

# float32's exp overflows at 88.7. Log-ratios are cut off at 80, which leaves a factor of e^8.7 for what multiplies them
# (advantage, KL weight, 1 / temperature), so that no product overflows to inf and no gradient becomes inf * 0 = NaN.
EXP_LIMIT = 80.0
NEG_INF = float("-inf")


# ---- one call -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LossSpec:
    """The settings of one call that are not tensors, under the names of `mr1fast.grpo_loss`'s keywords.

    A new float or bool here reaches both kernels by itself: see SWITCHES and NUMBERS.
    """

    loss_type: str = "grpo"
    importance_sampling_level: str = "token"
    use_bias_correction_kl: bool = False
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    delta: float = math.inf  # inf: the ratio has no second bound
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    kl_estimator: str = "k3"
    kl_clamp: float = math.inf  # inf: the log-ratio to the reference is not cut
    temperature: float = 1.0
    final_logit_softcapping: float = math.inf  # inf: the logits are not capped

    @property
    def policy(self) -> int:
        """The code under which the other two spellings know the policy term."""
        return _POLICY_CODES[self.loss_type]

    @property
    def estimator(self) -> int:
        """The code under which the other two spellings know the estimator of the KL."""
        return KL_ESTIMATORS.index(self.kl_estimator)

    @property
    def switches(self) -> tuple[int, ...]:
        """The values of SWITCHES."""
        return tuple(map(int, _switches_of(self)))

    @property
    def numbers(self) -> tuple[float, ...]:
        """The values of NUMBERS."""
        numbers: tuple[float, ...] = _numbers_of(self)
        return numbers


# What Triton and C++ are told about a token's objective besides its tensors: the switches that select code, and the
# numbers in it. Both are passed as lists in this order, which is also the order of TokenSpec in csrc/token_loss.h.
# (What becomes of the logits before is no part of it, see LogitMap.)
OF_LOGITS = ("temperature", "final_logit_softcapping")
SWITCHES = ("policy", "estimator", *(field.name for field in fields(LossSpec) if field.type == "bool"))
NUMBERS = tuple(field.name for field in fields(LossSpec) if field.type == "float" and field.name not in OF_LOGITS)
_switches_of, _numbers_of = attrgetter(*SWITCHES), attrgetter(*NUMBERS)


@dataclass(frozen=True)
class LossBatch:
    """All tensors of a call except its logits, checked and brought into one form; none needs a gradient.

    Tensors [B, L] other than ids and mask are in the compute dtype and may be expanded views (stride 0). What is not
    given for each token is in the LossSpec.
    """

    ids: Tensor  # [B, L] int64
    token_weight: Tensor  # [B, L], what each token's loss is multiplied by before the sum
    beta: Tensor  # 0-d or [B, L]
    mask: Tensor | None = None  # [B, L] bool
    advantages: Tensor | None = None  # [B, L], or None with:
    rewards: Tensor | None = None  # [B]
    num_generations: int = 1
    scale_rewards: str = "group"
    old_logps: Tensor | None = None  # [B, L]
    ref_logps: Tensor | None = None  # [B, L]
    is_ratio: Tensor | None = None  # [B, L]
    entropy_weight: Tensor | None = None  # 0-d, entropy_coef / number of tokens
    epsilons_low: Tensor | None = None  # [B, L]; None: the number in LossSpec, as for the next
    epsilons_high: Tensor | None = None  # [B, L]
    temperatures: Tensor | None = None  # [B, L], likewise
    cu_seqlens: Tensor | None = None  # [S + 1] where [B, L] is [1, T]: S packed completions


class LogitMap(NamedTuple):
    """What becomes of logits x before the softmax: softcap * tanh(x / softcap) / temperature."""

    temperature: float = 1.0
    softcap: float = math.inf  # inf: none
    temperatures: Tensor | None = None  # [B, L], instead of `temperature`

    @classmethod
    def of(cls, batch: LossBatch, spec: LossSpec) -> LogitMap:
        return cls(spec.temperature, spec.final_logit_softcapping, batch.temperatures)

    def __call__(self, x: Tensor) -> Tensor:
        """[B, L, V] in the compute dtype. A banned token (-inf) stays banned."""
        if self.softcap != math.inf:
            x = torch.where(x == NEG_INF, x, self.softcap * torch.tanh(x / self.softcap))
        return x / (self.temperature if self.temperatures is None else self.temperatures[..., None])


# What a backend's one pass returns: the loss (0-d); then, all [B, L], the loss of each token without its weight, logps,
# entropies, kl (None without ref_logps), is_low_clipped, is_high_clipped, and token_weight * dloss/dlogp.
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor]


def flat(*parts: LossBatch | LossSpec) -> tuple[Any, ...]:
    """The values of their fields, in order: registered ops take no dataclass, and astuple() would copy the tensors."""
    return tuple(getattr(part, name) for part in parts for name in type(part).__match_args__)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float64 for float64, float32 for all others."""
    return torch.promote_types(dtype, torch.float32)


# ---- logits to log-probabilities ------------------------------------------------------------------------------------


def score(logits: Tensor, ids: Tensor, mask: Tensor | None, logit_map: LogitMap) -> tuple[Tensor, Tensor]:
    """Log-probability of `ids` and entropy of each row, both [B, L], differentiable, 0 where masked.

    A banned token (logit -inf) has probability 0 and no gradient; if it is the id itself, logp is -inf, no gradient.
    Raises ValueError for an unmasked id out of range (CPU, outside of torch.compile).
    """
    check_ids(ids, mask, logits.shape[-1])
    z = logit_map(logits.to(compute_dtype(logits.dtype)))
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


# ---- log-probabilities to the loss ----------------------------------------------------------------------------------


def saturating_exp(x: Tensor) -> Tensor:
    """exp(min(x, EXP_LIMIT)), whose derivative is its value everywhere: bounded, but never flat.

    With a flat bound, nothing would pull a token that is far from the reference back towards it.
    """
    return torch.exp(torch.where(x <= EXP_LIMIT, x, EXP_LIMIT + (x - x.detach())))


# A policy term, and where it is clipped from below and from above, all [B, L].
Term = tuple[Tensor, Tensor, Tensor]


def _clip(ratio: Tensor, advantages: Tensor, logps: Tensor, spec: LossSpec) -> Term:
    """PPO's term: -min(ratio A, clip(ratio) A). If delta is given, it bounds the unclipped ratio from above."""
    low, high = 1 - spec.epsilon_low, 1 + spec.epsilon_high
    bounded = ratio.clamp(max=spec.delta)
    loss = -torch.min(bounded * advantages, ratio.clamp(low, high) * advantages)
    return loss, (bounded < low) & (advantages < 0), (bounded > high) & (advantages > 0)


def _cispo(ratio: Tensor, advantages: Tensor, logps: Tensor, spec: LossSpec) -> Term:
    """MiniMax-M1's term (arXiv 2506.13585): REINFORCE weighted by the ratio, which epsilon_high itself bounds."""
    loss = -ratio.clamp(max=spec.epsilon_high).detach() * advantages * logps
    return loss, _nowhere(ratio), (ratio > spec.epsilon_high) & (advantages > 0)


def _sapo(ratio: Tensor, advantages: Tensor, logps: Tensor, spec: LossSpec) -> Term:
    """Qwen's term (arXiv 2511.20347): instead of the clip, a sigmoid that has slope 1 at ratio 1."""
    t = torch.where(advantages > 0, spec.sapo_temperature_pos, spec.sapo_temperature_neg)
    loss = -torch.sigmoid(t * (ratio - 1)) * 4 / t * advantages
    return loss, _nowhere(ratio), _nowhere(ratio)


def _nowhere(like: Tensor) -> Tensor:
    return torch.zeros_like(like, dtype=torch.bool)


def _of_tokens(spec: LossSpec, batch: LossBatch) -> LossSpec:
    """The spec with those settings as tensors [B, L] that the batch gives for each token."""
    if batch.epsilons_low is None and batch.epsilons_high is None:
        return spec
    low, high = (
        torch.full_like(batch.token_weight, number) if tensor is None else tensor
        for tensor, number in ((batch.epsilons_low, spec.epsilon_low), (batch.epsilons_high, spec.epsilon_high))
    )
    return replace(spec, epsilon_low=low, epsilon_high=high)  # type: ignore[arg-type]


Policy = Callable[[Tensor, Tensor, Tensor, LossSpec], Term]
POLICIES: tuple[Policy, ...] = (_clip, _cispo, _sapo)  # in the order of their numbers in Triton and C++


# ---- the KL to the reference, from d = ref_logp - logp ----


def _k1(d: Tensor) -> Tensor:
    """Unbiased, of either sign. (The names k1, k2 and k3 are Schulman's, http://joschu.net/blog/kl-approx.html.)"""
    return -d


def _abs(d: Tensor) -> Tensor:
    return d.abs()


def _k2(d: Tensor) -> Tensor:
    return d.square() / 2


def _k3(d: Tensor) -> Tensor:
    """Unbiased, at least 0. It grows with e^d: beyond d = 80 the exponential (and with it the slope) stays at e^80. It
    is then far beyond any use as an estimate; what matters is that loss and gradient stay finite and keep pulling the
    policy back.
    """
    return saturating_exp(d) - d - 1


def _low_var_kl(d: Tensor) -> Tensor:
    """verl's and EasyR1's, and OpenRLHF's k3: cut at 10, beyond which nothing pulls the policy back any more.

    (verl and EasyR1 cut d at 20 before; at 20 either way the estimate is above 10 already.)
    """
    kl = _k3(d)
    return torch.where(kl > LOW_VAR_KL_LIMIT, LOW_VAR_KL_LIMIT, kl)


ESTIMATORS = (_k1, _abs, _k2, _k3, _low_var_kl)  # in the order of their numbers in Triton and C++
KL_ESTIMATORS = tuple(estimator.__name__.removeprefix("_") for estimator in ESTIMATORS)
LOW_VAR_KL_LIMIT = 10.0


def _kl(d: Tensor, spec: LossSpec) -> Tensor:
    if spec.kl_clamp != math.inf:  # not by clamp(), which would give a NaN the gradient 0
        d = torch.where(d > spec.kl_clamp, spec.kl_clamp, torch.where(d < -spec.kl_clamp, -spec.kl_clamp, d))
    return ESTIMATORS[spec.estimator](d)


def token_advantages(batch: LossBatch) -> Tensor:
    """The advantage of each token, [B, L] (a view), computed from the rewards if those were given."""
    if batch.advantages is not None:
        return batch.advantages
    assert batch.rewards is not None
    advantages = group_advantages(batch.rewards, batch.num_generations, batch.scale_rewards)
    return advantages[:, None].expand(batch.ids.shape)


def objective(logps: Tensor, batch: LossBatch, spec: LossSpec) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Per-token loss, KL, and the two clip flags, all [B, L] and 0 where masked; differentiable in `logps` [B, L]."""
    keep = (lambda x: x) if batch.mask is None else (lambda x: torch.where(batch.mask, x, 0))
    dead = logps == NEG_INF
    logps = torch.where(dead, 0, logps)
    advantages = keep(token_advantages(batch))

    if batch.old_logps is None:
        log_ratio = logps - logps.detach()
    else:
        old = keep(batch.old_logps)
        # Finite, so that a token the old policy had banned gives a saturated ratio and not inf - inf.
        log_ratio = logps - old.clamp(min=-1e30)
        log_ratio = torch.where(dead, torch.where(old == NEG_INF, 0, NEG_INF), log_ratio)
    if spec.importance_sampling_level == "sequence":
        completions = Completions.of(logps.shape, batch.cu_seqlens)
        total = completions.spread(completions.sums(keep(log_ratio)))
        log_ratio = (total / completions.tokens(batch.mask)).to(logps.dtype).expand(logps.shape)
    ratio = saturating_exp(log_ratio)

    loss, is_low, is_high = _LOSS_TYPES[spec.loss_type].policy(ratio, advantages, logps, _of_tokens(spec, batch))
    if batch.is_ratio is not None:
        loss = loss * keep(batch.is_ratio)

    kl = None
    if batch.ref_logps is not None:
        d = torch.where(dead, 0, keep(batch.ref_logps) - logps)
        kl = _kl(d, spec)
        if spec.use_bias_correction_kl:
            kl = kl * ratio
        kl = keep(kl)
        # beta 0 switches the term off even where kl is inf (a token the reference has banned).
        loss = loss + torch.where(batch.beta == 0, 0, batch.beta * kl)
    return keep(loss), kl, keep(is_low), keep(is_high)


# ---- tokens to one number -------------------------------------------------------------------------------------------


class LossType(NamedTuple):
    policy: Policy
    normaliser: normalisers.Normaliser


_LOSS_TYPES = {
    "grpo": LossType(_clip, normalisers.completion_tokens),
    "bnpo": LossType(_clip, normalisers.all_tokens),
    "dr_grpo": LossType(_clip, normalisers.longest_completions),
    "dapo": LossType(_clip, normalisers.batch_tokens),
    "luspo": LossType(_clip, normalisers.completions),
    "cispo": LossType(_cispo, normalisers.batch_tokens),
    "sapo": LossType(_sapo, normalisers.completion_tokens),
}
LOSS_TYPES = tuple(_LOSS_TYPES)
_POLICY_CODES = {name: POLICIES.index(loss_type.policy) for name, loss_type in _LOSS_TYPES.items()}


def token_weight(
    ids: Tensor,
    mask: Tensor | None,
    dtype: torch.dtype,
    loss_type: str,
    max_completion_length: float | None,
    num_items_in_batch: Tensor | float | None,
    completions: Completions | None = None,
    num_sequences: Tensor | float | None = None,
) -> Tensor:
    """The reciprocal of its normaliser for each token, [B, L] (a view)."""
    completions = completions or Completions.of(ids.shape, None)
    tokens = Tokens(ids, mask, completions, max_completion_length, num_items_in_batch, num_sequences)
    count = _LOSS_TYPES[loss_type].normaliser(tokens)
    if isinstance(count, Tensor):
        weight = count.to(dtype).reciprocal()
    else:  # a number wherever possible: small tensors cost more than they seem to
        weight = torch.full((), 1 / count, dtype=dtype, device=ids.device)
    return weight.expand(ids.shape)


def aggregate(per_token_loss: Tensor, entropies: Tensor | None, batch: LossBatch) -> Tensor:
    """The loss, 0-d: normalised sum of the per-token losses minus the entropy bonus, if there is one."""
    loss = (per_token_loss * batch.token_weight).sum()
    if batch.entropy_weight is not None:
        assert entropies is not None
        loss = loss - batch.entropy_weight * entropies.sum()
    return loss
