"""Which objectives there are: for each, its policy term, its normaliser, and what its tokens depend on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mr1fast.kernels import batchwise, normalisers, policies
from mr1fast.kernels.completions import Completions
from mr1fast.kernels.normalisers import Tokens
from mr1fast.kernels.policies import POLICIES, Policy

IMPORTANCE_SAMPLING_LEVELS = ("token", "sequence", "sequence_token")


class LossType(NamedTuple):
    policy: Policy
    normaliser: normalisers.Normaliser
    sees: str = "token"  # or "completion", "batch": what the policy term of a token depends on
    levels: tuple[str, ...] = IMPORTANCE_SAMPLING_LEVELS  # those of its ratio that have a meaning


_TOKEN = ("token",)
BY_NAME = {
    "grpo": LossType(policies.clip, normalisers.completion_tokens),
    "bnpo": LossType(policies.clip, normalisers.all_tokens),
    "dr_grpo": LossType(policies.clip, normalisers.longest_completions),
    "dapo": LossType(policies.clip, normalisers.batch_tokens),
    "luspo": LossType(policies.clip, normalisers.completions),
    "cispo": LossType(policies.cispo, normalisers.batch_tokens),
    "cispo_two_sided": LossType(policies.cispo_two_sided, normalisers.batch_tokens),
    "sapo": LossType(policies.sapo, normalisers.completion_tokens),
    "dppo_tv": LossType(policies.dppo_tv, normalisers.batch_tokens, levels=_TOKEN),
    "dppo_kl": LossType(policies.dppo_kl, normalisers.batch_tokens, levels=_TOKEN),
    "gmpo": LossType(batchwise.gmpo, normalisers.completion_tokens, "completion", _TOKEN),
    "clip_cov": LossType(batchwise.clip_cov, normalisers.batch_tokens, "batch", _TOKEN),
    "kl_cov": LossType(batchwise.kl_cov, normalisers.batch_tokens, "batch", _TOKEN),
}
LOSS_TYPES = tuple(BY_NAME)
# The codes under which the other two spellings know the policy terms of single tokens.
POLICY_CODES = {
    name: POLICIES.index(loss_type.policy) for name, loss_type in BY_NAME.items() if loss_type.sees == "token"
}
ONE_PASS_LOSS_TYPES = tuple(POLICY_CODES)


def levels_of(loss_type: str) -> tuple[str, ...]:
    """The importance sampling levels that a loss type has."""
    return BY_NAME[loss_type].levels


def normalised_by(*counts: normalisers.Normaliser) -> tuple[str, ...]:
    """The loss types with one of these normalisers."""
    return tuple(name for name, loss_type in BY_NAME.items() if loss_type.normaliser in counts)


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
    tokens = Tokens(ids, mask, dtype, completions, max_completion_length, num_items_in_batch, num_sequences)
    count = BY_NAME[loss_type].normaliser(tokens)
    if isinstance(count, Tensor):
        weight = count.to(dtype).reciprocal()
    else:  # a number wherever possible: small tensors cost more than they seem to
        weight = torch.full((), 1 / count, dtype=dtype, device=ids.device)
    return weight.expand_as(ids)
