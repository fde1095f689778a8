"""Which tokens of a row attend to which, and how those rows are laid out for attention kernels that take rectangles.

A row is T tokens one after another, without padding. Segment i of the queries attends to segment i of the keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

# Tokens by which segments in one rectangle may differ, or a quarter of the longest: each rectangle costs some calls.
MOST_PADDING = 8


@dataclass(frozen=True)
class Rectangle:
    """n segments of about the same length, padded on the right to L tokens.

    shape: (n, L). index: [n * L] int64, rows of a tensor [T, ...]; of padding, the first. start: the first row where
    segments of one length follow one another, so that they can be viewed and need not be gathered; else None.
    padding: [n, L] bool; counted: the places that are no padding, and what index has there, [m] int64 each. Both are
    None where nothing is padded.
    """

    shape: tuple[int, int]
    index: Tensor
    start: int | None
    padding: Tensor | None
    counted: tuple[Tensor, Tensor] | None

    @classmethod
    def of(cls, starts: list[int], lengths: list[int], device: torch.device) -> Rectangle:
        shape = len(starts), max(lengths)
        offsets = torch.arange(shape[1], device=device)
        index = torch.tensor(starts, device=device)[:, None] + offsets
        if min(lengths) == shape[1]:
            adjacent = starts == [*range(starts[0], starts[0] + len(starts) * shape[1], shape[1])]
            return cls(shape, index.flatten(), starts[0] if adjacent else None, None, None)
        padding = offsets >= torch.tensor(lengths, device=device)[:, None]
        counted = (~padding).flatten().nonzero()[:, 0]
        index = index.masked_fill(padding, 0).flatten()
        return cls(shape, index, None, padding, (counted, index[counted]))

    def take(self, rows: Tensor) -> Tensor:
        """[n, L, ...] of [T, ...]."""
        taken = rows.index_select(0, self.index) if self.start is None else rows[self._viewed]
        return taken.unflatten(0, self.shape)

    def put(self, values: Tensor, rows: Tensor) -> None:
        """Write [n, L, ...] into [T, ...]."""
        values = values.flatten(0, 1)
        if self.start is not None:
            rows[self._viewed] = values
        elif self.counted is None:
            rows.index_copy_(0, self.index, values)
        else:
            places, index = self.counted
            rows.index_copy_(0, index, values.index_select(0, places))

    @property
    def _viewed(self) -> slice:
        assert self.start is not None
        return slice(self.start, self.start + len(self.index))


class Segments:
    """causal: the segments of queries and keys are the same, and a query does not see what is behind it."""

    def __init__(
        self,
        query_lengths: Sequence[int],
        key_lengths: Sequence[int] | None = None,
        *,
        causal: bool,
        device: torch.device,
    ):
        self.query_lengths = [*query_lengths]
        self.key_lengths = self.query_lengths if key_lengths is None else [*key_lengths]
        self.causal, self.device = causal, device

    @cached_property
    def rectangles(self) -> list[tuple[Rectangle, Rectangle]]:
        """(queries, keys) for kernels that take rectangles. Keys are only padded where causality hides the padding."""
        starts = [[0, *accumulate(each)] for each in (self.query_lengths, self.key_lengths)]

        def rectangle(members: list[int], starts: list[int], lengths: list[int]) -> Rectangle:
            return Rectangle.of([starts[i] for i in members], [lengths[i] for i in members], self.device)

        found = []
        for members in self._alike():
            queries = rectangle(members, starts[0], self.query_lengths)
            same = self.key_lengths is self.query_lengths
            found.append((queries, queries if same else rectangle(members, starts[1], self.key_lengths)))
        return found

    def _alike(self) -> Iterator[list[int]]:
        """Segments that go into one rectangle, longest first; not those without a query."""
        order = [i for i, length in enumerate(self.query_lengths) if length]
        order.sort(key=lambda i: (-self.key_lengths[i], -self.query_lengths[i]))
        members: list[int] = []
        for i in order:
            if members and not self._fits(i, members[0]):
                yield members
                members = []
            members.append(i)
        if members:
            yield members

    def _fits(self, i: int, first: int) -> bool:
        if not self.causal and self.key_lengths[i] != self.key_lengths[first]:
            return False
        length, most = self.query_lengths[i], self.query_lengths[first]
        return most - length <= max(MOST_PADDING, most // 4)

    @cached_property
    def bounds(self) -> tuple[Tensor, Tensor, int, int]:
        """For kernels that take segments as they are: where queries and keys begin [n + 1] int32; longest lengths."""
        starts = [
            torch.tensor([0, *accumulate(each)], dtype=torch.int32, device=self.device)
            for each in (self.query_lengths, self.key_lengths)
        ]
        return starts[0], starts[1], max(self.query_lengths), max(self.key_lengths)
