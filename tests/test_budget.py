"""The error budget that the kernels are held to: what it accepts and what it must not."""

import pytest
import torch

from mr1fast.kernels.self_test import assert_within_budget

inf, nan = float("inf"), float("nan")


def within(actual, exact, peer, floor=1e-3):
    assert_within_budget("x", *(torch.tensor(values, dtype=torch.float64) for values in (actual, exact, peer)), floor)


@pytest.mark.parametrize(
    ("actual", "exact", "peer"),
    [
        ([1.0, 2.0], [1.0, 2.0], [1.0, 2.0]),
        ([1.0, 2.25], [1.0, 2.0], [1.125, 2.0]),  # twice the peer's error
        ([1.0019, 1.0], [1.0, 1.0], [1.0, 1.0]),  # floor * (1 + 1)
        ([nan, inf, -inf, 1.0], [nan, inf, -inf, 1.0], [nan, inf, -inf, 1.0]),
        ([nan], [nan], [0.0]),
        ([], [], []),
    ],
)
def test_accepted(actual, exact, peer):
    within(actual, exact, peer)


@pytest.mark.parametrize(
    ("actual", "exact", "peer"),
    [
        ([1.0, 2.3], [1.0, 2.0], [1.125, 2.0]),
        ([1.003, 1.0], [1.0, 1.0], [1.0, 1.0]),
        ([0.0, 1.0], [nan, 1.0], [nan, 1.0]),
        ([nan, 1.0], [0.0, 1.0], [0.0, 1.0]),
        ([nan], [inf], [inf]),
        ([-inf], [inf], [inf]),
        ([torch.finfo(torch.float64).max], [inf], [inf]),  # what torch.nan_to_num makes of an infinity
        ([inf, 1.0], [3e38, 1.0], [inf, 1.0]),  # a peer that is off by infinity
        ([1.0], [1.0, 1.0], [1.0, 1.0]),
    ],
)
def test_rejected(actual, exact, peer):
    with pytest.raises(AssertionError, match=r"^x: "):
        within(actual, exact, peer)
