"""The order of the examples: the same in every run of a seed, and not kept for ever."""

import random
import tracemalloc

from mr1fast.training import order


def test_an_epoch_is_a_shuffle_that_depends_on_the_seed_and_the_epoch_alone():
    rows = list(range(50))
    random.Random("3/5").shuffle(rows)
    assert order.rows_of_step(3, 250, 50, 50) == rows
    assert order.rows_of_step(3, 245, 10, 50)[5:] == rows[:5]
    assert order.rows_of_step(3, 300, 50, 50) != rows != order.rows_of_step(4, 250, 50, 50)
    assert order.rows_of_step(0, 0, 7, 2) == [place for epoch in range(4) for place in _epoch(epoch)][:7]


def _epoch(epoch: int) -> list[int]:
    return order.rows_of_step(0, 2 * epoch, 2, 2)


def test_past_epochs_are_forgotten():
    order._epoch.cache_clear()
    tracemalloc.start()
    for epoch in range(20):
        order.rows_of_step(0, 5000 * epoch, 16, 5000)
    assert tracemalloc.get_traced_memory()[0] < 200_000
    tracemalloc.stop()
