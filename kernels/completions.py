"""Which tokens form a completion: a row of [B, L], or a stretch of the packed form [1, T].

A kernel never asks: what it needs to know of a completion (advantage, normaliser) it gets for each token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Completions(NamedTuple):
    """The completions of a call."""

    size: int  # how many there are
    length: int  # L, or T
    of_token: Tensor | None = None  # packed: [1, T] int64, the completion that each token belongs to

    @classmethod
    def of(cls, shape: tuple[int, ...], cu_seqlens: Tensor | None) -> Completions:
        """Those of tensors [B, L] or, with cu_seqlens [S + 1], those packed into [1, T]."""
        if cu_seqlens is None:
            return cls(shape[0], shape[1])
        at = torch.arange(shape[1], device=cu_seqlens.device, dtype=cu_seqlens.dtype)
        number = torch.searchsorted(cu_seqlens[1:].contiguous(), at, right=True)
        return cls(cu_seqlens.shape[0] - 1, shape[1], number[None])

    def sums(self, values: Tensor) -> Tensor:
        """Sums over each completion, [size], of values [B, L].

        Packed values are summed in float64: one after the other, float32 would lose digits, and on a GPU the order, and
        with it the last digit, would change from run to run.
        """
        if self.of_token is None:
            return values.sum(1)
        dtype = torch.float64 if values.is_floating_point() else torch.int64
        return values.new_zeros(self.size, dtype=dtype).index_add(0, self.of_token[0], values[0].to(dtype))

    def spread(self, values: Tensor) -> Tensor:
        """Values [size], one for each completion, in a shape that broadcasts to [B, L]."""
        return values.unsqueeze(1) if self.of_token is None else values[self.of_token]

    def tokens(self, mask: Tensor | None) -> Tensor | int:
        """How many tokens of its completion count, at least 1, for each token: broadcasts to [B, L]."""
        if mask is not None:
            counts = mask.sum(1, keepdim=True) if self.of_token is None else self.spread(self.sums(mask))
            return counts.clamp_(min=1)
        if self.of_token is None:
            return max(self.length, 1)
        return self.spread(self.sums(torch.ones_like(self.of_token)))
