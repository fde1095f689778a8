"""The definition of the loss: plain PyTorch with no hand-written derivative, selectable as `backend="torch"`.

Everything the fused kernels compute is defined here and in the files that this one puts together (`policies.py`,
`batchwise.py`, `estimators.py`, `normalisers.py`, `loss_types.py`), and they are tested against these in float64. The
loss of one token is written out in two more places together with its derivative: `triton_objective.py` and
`csrc/token_loss.h`.

A new objective of single tokens is a function in `policies.py`, a row in `loss_types.py`, a branch in each of the
other two spellings, and its statement in tests/oracle.py. One that needs more than a token at a time is a function in
`batchwise.py`, a row and its statement.

Sources: OThink-MR1 (arXiv 2503.16081) for the GRPO-D objective, TRL 1.16's `GRPOTrainer._compute_loss` for the other
loss types. Shapes: B completions, L tokens, V vocabulary; S packed completions of T tokens in all are [1, T], and
cu_seqlens says where each begins. 16-bit logits are computed in float32, float64 in float64.

Masked tokens are replaced by harmless values *before* any arithmetic, not multiplied by zero after it: 0 * inf is NaN,
and a padded position may hold anything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mr1fast.kernels import batchwise, loss_types
from mr1fast.kernels.advantages import group_advantages
from mr1fast.kernels.completions import Completions
from mr1fast.kernels.estimators import KL_ESTIMATORS, kl_estimate
from mr1fast.kernels.exponentials import NEG_INF, saturating_exp
from mr1fast.kernels.policies import PolicyInput

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
    clip_ratio_c: float = math.inf  # inf: nor where the advantage is negative
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    kl_estimator: str = "k3"
    kl_clamp: float = math.inf  # inf: the log-ratio to the reference is not cut
    temperature: float = 1.0
    final_logit_softcapping: float = math.inf  # inf: the logits are not capped

    @property
    def policy(self) -> int:
        """The code under which the other two spellings know the policy term."""
        return loss_types.POLICY_CODES[self.loss_type]

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
class BatchwiseSpec(LossSpec):
    """The settings of a call that needs more than a token at a time. It takes two passes: no kernel ever sees this."""

    top_entropy_quantile: float = 1.0
    off_policy_mask_threshold: float = math.inf
    sampling_logps: Tensor | None = None  # [B, L], for the mask before; None: the old log-probabilities
    clip_cov_ratio: float = 0.0002
    clip_cov_lb: float = 1.0
    clip_cov_ub: float = 5.0
    kl_cov_ratio: float = 0.0002
    ppo_kl_coef: float = 0.1


class LossBatch(NamedTuple):
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


def flat(batch: LossBatch, spec: LossSpec) -> tuple[Any, ...]:
    """The values of their fields, in order, as registered ops take them."""
    return *batch, *(getattr(spec, name) for name in spec.__match_args__)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float64 for float64, float32 for all others."""
    return dtype if dtype == torch.float64 else torch.float32


# ---- logits to log-probabilities ------------------------------------------------------------------------------------


def score(logits: Tensor, ids: Tensor, mask: Tensor | None, logit_map: LogitMap) -> tuple[Tensor, Tensor]:
    """Log-probability of `ids` and entropy of each row, both [B, L], differentiable, 0 where masked.

    A banned token (logit -inf) has probability 0 and no gradient; if it is the id itself, logp is -inf, no gradient.
    Raises ValueError for an unmasked id out of range (CPU, outside of torch.compile).
    """
    check_ids(ids, mask, logits.shape[-1])
    x = logits.to(compute_dtype(logits.dtype))
    if mask is not None:  # before the map, whose derivative at NaN would be NaN, also times 0
        x, ids = torch.where(mask[..., None], x, 0), torch.where(mask, ids, 0)
    z = logit_map(x)
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


def _of_tokens(spec: LossSpec, batch: LossBatch) -> LossSpec:
    """The spec with those settings as tensors [B, L] that the batch gives for each token."""
    if batch.epsilons_low is None and batch.epsilons_high is None:
        return spec
    low, high = (
        torch.full_like(batch.token_weight, number) if tensor is None else tensor
        for tensor, number in ((batch.epsilons_low, spec.epsilon_low), (batch.epsilons_high, spec.epsilon_high))
    )
    return replace(spec, epsilon_low=low, epsilon_high=high)  # type: ignore[arg-type]


def token_advantages(batch: LossBatch) -> Tensor:
    """The advantage of each token, [B, L] (a view), computed from the rewards if those were given."""
    if batch.advantages is not None:
        return batch.advantages
    assert batch.rewards is not None
    advantages = group_advantages(batch.rewards, batch.num_generations, batch.scale_rewards)
    return advantages[:, None].expand(batch.ids.shape)


def objective(
    logps: Tensor, batch: LossBatch, spec: LossSpec, high_entropy: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Per-token loss, KL, and the two clip flags, all [B, L] and 0 where masked; differentiable in `logps` [B, L].

    high_entropy: bool [B, L] or None, the tokens that keep their policy term.
    """
    keep = (lambda x: x) if batch.mask is None else (lambda x: torch.where(batch.mask, x, 0))
    loss_type, completions = loss_types.BY_NAME[spec.loss_type], Completions.of(logps.shape, batch.cu_seqlens)
    dead = logps == NEG_INF
    logps = torch.where(dead, 0, logps)
    old, log_ratio = _log_ratio(logps, dead, None if batch.old_logps is None else keep(batch.old_logps))
    ratio = saturating_exp(_at_level(log_ratio, logps, batch.mask, completions, spec.importance_sampling_level))

    averaged = batch.mask if high_entropy is None else high_entropy
    x = PolicyInput(ratio, log_ratio, keep(token_advantages(batch)), logps, old, dead, averaged, completions)
    loss, is_low, is_high = loss_type.policy(x, _of_tokens(spec, batch))
    if isinstance(spec, BatchwiseSpec):
        if high_entropy is not None and loss_type.sees != "completion":
            loss = loss * high_entropy
        if spec.off_policy_mask_threshold != math.inf:
            loss = loss * batchwise.near_policy(x, batch.mask, spec)
    if batch.is_ratio is not None:
        loss = loss * keep(batch.is_ratio)

    kl = None
    if batch.ref_logps is not None:
        d = torch.where(dead, 0, keep(batch.ref_logps) - logps)
        kl = kl_estimate(d, spec.kl_estimator, spec.kl_clamp)
        if spec.use_bias_correction_kl:
            kl = kl * ratio
        kl = keep(kl)
        # beta 0 switches the term off even where kl is inf (a token the reference has banned).
        loss = loss + torch.where(batch.beta == 0, 0, batch.beta * kl)
    return keep(loss), kl, keep(is_low), keep(is_high)


def _log_ratio(logps: Tensor, dead: Tensor, old: Tensor | None) -> tuple[Tensor, Tensor]:
    """(old log-probabilities, log-ratio of each token); logps: 0 where the token is banned now, `dead`."""
    if old is None:
        return torch.where(dead, -1e30, logps.detach()), logps - logps.detach()
    # Finite, so that a token the old policy had banned gives a saturated ratio and not inf - inf.
    finite = old.clamp(min=-1e30)
    return finite, torch.where(dead, torch.where(old == NEG_INF, 0, NEG_INF), logps - finite)


def _at_level(log_ratio: Tensor, logps: Tensor, mask: Tensor | None, completions: Completions, level: str) -> Tensor:
    """The log-ratio at one of IMPORTANCE_SAMPLING_LEVELS, [B, L]."""
    if level == "token":
        return log_ratio
    mean = batchwise.completion_means(log_ratio, mask, completions)
    if level == "sequence":  # GSPO (arXiv 2507.18071)
        return mean
    return mean.detach() + (logps - logps.detach())  # GSPO-token: its value, but each token's own gradient


# ---- tokens to one number -------------------------------------------------------------------------------------------


def aggregate(per_token_loss: Tensor, entropies: Tensor | None, batch: LossBatch) -> Tensor:
    """The loss, 0-d: normalised sum of the per-token losses minus the entropy bonus, if there is one."""
    loss = (per_token_loss * batch.token_weight).sum()
    if batch.entropy_weight is not None:
        assert entropies is not None
        loss = loss - batch.entropy_weight * entropies.sum()
    return loss
