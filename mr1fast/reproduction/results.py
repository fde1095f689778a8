"""The finished arms by what is asked of them: a figure of an arm over its seeds, a difference of two arms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from mr1fast.reproduction.arms import BASE, Test
from mr1fast.reproduction.experiments import BASE_RUN, Comparison, Run
from mr1fast.reproduction.statistics import Difference, holm, paired

ACCURACY, ANYHOW = "greedy_accuracy", "anyhow_accuracy"


@dataclass(frozen=True)
class Results:
    """records: of the finished arms, as `train.result_of_run` returns them."""

    records: Mapping[Run, Mapping[str, Any]]

    def seeds(self, task: str, arm: str) -> list[int]:
        return sorted(run.seed for run in self.records if (run.task, run.arm) == (task, arm))

    def values(self, task: str, arm: str, test: Test, figure: str = ACCURACY) -> dict[int, float]:
        """Seed -> per cent. The base has no seed; its value is that of every seed that any arm has."""
        if arm == BASE.name:
            value = self.base(test, figure)
            return {run.seed: value for run in self.records if run != BASE_RUN}
        return {
            seed: 100 * self.records[Run(task, arm, seed)]["tests"][test.name][figure] for seed in self.seeds(task, arm)
        }

    def base(self, test: Test, figure: str = ACCURACY) -> float:
        return 100 * self.records[BASE_RUN]["tests"][test.name][figure]

    def difference(self, comparison: Comparison) -> Difference | None:
        """Over the seeds that all of its arms have; None if there are none."""
        left, right = (
            _means([self.values(comparison.task, arm, comparison.test) for arm in side])
            for side in (comparison.left, comparison.right)
        )
        return paired(left, right)

    def differences(self, comparisons: Sequence[Comparison]) -> list[tuple[Comparison, Difference, float]]:
        """Those that can be had, with their p values corrected for all of them together."""
        found = [(one, difference) for one in comparisons if (difference := self.difference(one)) is not None]
        corrected = holm([difference.p for _, difference in found])
        return [(one, difference, p) for (one, difference), p in zip(found, corrected)]

    def option(self, task: str, arm: str, name: str, default: Any = None) -> Any:
        """An option that the arm was trained with."""
        run = Run(task, arm, self.seeds(task, arm)[0])
        return self.records[run]["settings"]["options"].get(name, default)

    def problems(self, test: Test) -> int:
        return self.records[BASE_RUN]["tests"][test.name]["n"]


def _means(sides: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """Seed -> mean of several arms, for the seeds that all of them have."""
    common = set.intersection(*(set(side) for side in sides))
    return {seed: mean(side[seed] for side in sides) for seed in common}


def spread(values: Mapping[int, float]) -> tuple[float, float | None]:
    """Mean and standard deviation over the seeds; no deviation of one seed."""
    numbers = list(values.values())
    return mean(numbers), stdev(numbers) if len(numbers) > 1 else None
