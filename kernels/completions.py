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
    of_token: Tensor | None = None  # packed: [1, T], the completion that each token belongs to
    lengths: Tensor | None = None  # packed: [size]

    @classmethod
    def of(cls, shape: tuple[int, ...], cu_seqlens: Tensor | None) -> Completions:
        """Those of tensors [B, L] or, with cu_seqlens [S + 1], those packed into [1, T]."""
        if cu_seqlens is None:
            return cls(shape[0], shape[1])
        lengths = cu_seqlens.diff()
        of_token = torch.repeat_interleave(lengths, output_size=shape[1])  # told the size, a GPU is not waited for
        return cls(lengths.shape[0], shape[1], of_token[None], lengths)

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

    def tokens(self, mask: Tensor | None, dtype: torch.dtype = torch.int64) -> Tensor | int:
        """How many tokens of its completion count, at least 1, for each token: broadcasts to [B, L].

        dtype: of the sums over rows; float32 is exact up to 2^24 tokens.
        """
        if mask is not None:
            counts = mask.sum(1, keepdim=True, dtype=dtype) if self.of_token is None else self.spread(self.sums(mask))
            return counts.clamp_(min=1)
        return max(self.length, 1) if self.lengths is None else self.spread(self.lengths)
