"""What differences between arms say: paired by seed, with t intervals, corrected where many are looked at."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

LEVEL = 0.05


@dataclass(frozen=True)
class Difference:
    """Of two arms over the seeds that both have. mean, error (of the mean), low and high (95 %) are in points.

    p: two-sided, of Student's t test that the mean is 0; NaN with fewer than two seeds, as are error, low and high.
    """

    mean: float
    error: float
    low: float
    high: float
    p: float
    n: int


def paired(left: Mapping[int, float], right: Mapping[int, float]) -> Difference | None:
    """left, right: seed -> value in points. None if they have no seed in common."""
    values = [left[seed] - right[seed] for seed in sorted(left.keys() & right.keys())]
    if not values:
        return None
    n, centre = len(values), mean(values)
    if n < 2:
        return Difference(centre, math.nan, math.nan, math.nan, math.nan, n)
    error = stdev(values) / math.sqrt(n)
    half = t_quantile(1 - LEVEL / 2, n - 1) * error
    if error == 0:
        return Difference(centre, 0.0, centre, centre, 1.0 if centre == 0 else 0.0, n)
    return Difference(centre, error, centre - half, centre + half, t_two_sided(centre / error, n - 1), n)


def t_two_sided(t: float, df: int) -> float:
    """The probability that Student's t with so many degrees of freedom is as far from 0 as this.

    The finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    angle = math.atan2(abs(t), math.sqrt(df))
    cosine, odd = math.cos(angle), df % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(2 + odd, df + 1, 2):
        total += term
        term *= cosine**2 * (k - 1) / k
    within = math.sin(angle) * total
    return max(0.0, 1 - (2 / math.pi * (angle + within) if odd else within))


def t_quantile(probability: float, df: int) -> float:
    """The t below which Student's t is with this probability, which is at least 0.5; by bisection."""
    low, high = 0.0, 1e4
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if 1 - t_two_sided(middle, df) / 2 < probability else (low, middle)
    return high


def holm(p: Sequence[float]) -> list[float]:
    """Holm's correction: the p values of m looks, so that all of them together err in 5 % of cases at most.

    NaN, a look without a p value, stays NaN and is not counted.
    """
    order = sorted((i for i in range(len(p)) if not math.isnan(p[i])), key=lambda i: p[i])
    corrected, largest = [math.nan] * len(p), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p[i]))
        corrected[i] = largest
    return corrected


def binomial_error(accuracy: float, n: int) -> float:
    """The standard error in points that n test problems add to an accuracy in per cent."""
    share = accuracy / 100
    return 100 * math.sqrt(max(share * (1 - share), 0.0) / n)
