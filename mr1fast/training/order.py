"""The order in which training goes through the examples."""

from __future__ import annotations

import random
from array import array
from functools import lru_cache


def rows_of_step(seed: int, first: int, count: int, total: int) -> list[int]:
    """`count` of the `total` rows, from position `first` on: each row once per epoch, each epoch in another order."""
    return [_epoch(seed, place // total, total)[place % total] for place in range(first, first + count)]


@lru_cache(maxsize=2)  # a step may be the end of one epoch and the beginning of the next
def _epoch(seed: int, epoch: int, total: int) -> array[int]:
    order = array("q", range(total))
    random.Random(f"{seed}/{epoch}").shuffle(order)  # strings seed through SHA-512: the same on every machine
    return order
