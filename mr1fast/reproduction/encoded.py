"""A policy whose prompts are encoded once: the arms of a process share their tests and, with a seed, their drawings.

To process images and to place their tokens takes a quarter of the time in which a model of this size is tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from mr1fast.data.example import Example
from mr1fast.model.policy import Policy
from mr1fast.model.prompts import IMAGES

MOST = 3000  # prompts that are kept, of some 80 KB each


class EncodedOnce(Policy):
    """known: what has been encoded, of all policies with this processor; examples must have an image."""

    def __init__(self, model: Any, processor: Any, known: dict[tuple, tuple[Example, dict[str, Tensor]]]):
        super().__init__(model, processor)
        self.known = known

    def encode(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        rows = [self._encoded(example) for example in examples]
        longest = max(row["input_ids"].shape[-1] for row in rows)
        return {name: torch.cat([self._padded(name, row[name], longest) for row in rows]) for name in rows[0]}

    def _encoded(self, example: Example) -> dict[str, Tensor]:
        key = example.problem, *map(id, example.images)
        if key not in self.known:
            if len(self.known) >= MOST:
                self.known.clear()
            self.known[key] = example, super().encode([example])  # while it is kept, no other has its address
        return self.known[key][1]

    def _padded(self, name: str, row: Tensor, longest: int) -> Tensor:
        """On the left, to so many tokens, with what `Policy.encode` has there."""
        if name in (*IMAGES, "next_position"):
            return row
        return pad(row, (longest - row.shape[-1], 0), value=self.pad_id if name == "input_ids" else 0)
