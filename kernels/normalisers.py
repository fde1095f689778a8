"""The divisors of the sum of a batch's token losses; `loss_types.py` says which loss type uses which of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mr1fast.kernels.completions import Completions


class Tokens(NamedTuple):
    """What the normalisers count."""

    ids: Tensor  # [B, L]
    mask: Tensor | None  # [B, L]
    dtype: torch.dtype  # to compute in
    completions: Completions
    max_completion_length: float | None
    num_items_in_batch: Tensor | float | None
    num_sequences: Tensor | float | None


# What a token's loss is divided by: a number, or a tensor that broadcasts to [B, L]. Counts of tokens are at least 1.
Normaliser = Callable[[Tokens], Tensor | float]


def token_count(ids: Tensor, mask: Tensor | None) -> Tensor | int:
    """Number of unmasked tokens, at least 1; 0-d where there is a mask."""
    return max(ids.numel(), 1) if mask is None else mask.sum().clamp(min=1)


def completion_tokens(tokens: Tokens) -> Tensor | float:
    """The mean over a completion's tokens, then over completions."""
    counts, many = tokens.completions.tokens(tokens.mask, tokens.dtype), completions(tokens)
    return counts.mul_(many) if isinstance(counts, Tensor) and isinstance(many, int) else counts * many


def completions(tokens: Tokens) -> Tensor | float:
    """The sum over a completion's tokens, the mean over completions, of which this call may see only a part."""
    many = tokens.num_sequences
    if many is None:
        return max(tokens.completions.size, 1)
    return many.where(many > 0, 1) if isinstance(many, Tensor) else many


def longest_completions(tokens: Tokens) -> Tensor | float:
    """The mean over all tokens that could exist: every token has the same weight, however long the completions are."""
    if tokens.max_completion_length is None:
        raise ValueError("max_completion_length must be given for loss_type='dr_grpo' (its normaliser), got None")
    return completions(tokens) * tokens.max_completion_length


def all_tokens(tokens: Tokens) -> Tensor | float:
    """The mean over the tokens of this call."""
    return token_count(tokens.ids, tokens.mask)


def batch_tokens(tokens: Tokens) -> Tensor | float:
    """The mean over the tokens of a whole batch, of which this call may see only a part."""
    items = tokens.num_items_in_batch
    if items is None:
        return all_tokens(tokens)
    return items.clamp(min=1) if isinstance(items, Tensor) else max(items, 1)


# Those that are means over completions.
OVER_COMPLETIONS = (completion_tokens, completions, longest_completions)
