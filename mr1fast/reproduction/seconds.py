"""How long arms take."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from mr1fast.reproduction.arms import STEPS
from mr1fast.reproduction.experiments import BASE_RUN, Run

# Seconds where none of that kind has been measured: of a step, and of all tests together. They are those of an AMD EPYC
# with AVX2 only, both of whose cores were at work on arms and on nothing else (the 141 arms of `all`).
STEP = {"sft": 0.13, "grpo on vc": 0.27, "grpo on gr": 0.40}
TESTS = 3.0
WATCHING = 3.0  # Fig. 1's arms are tested on the way


class Estimate:
    """Seconds of an arm by its kind: the mean of those that were run, or else from what a step takes."""

    def __init__(self, steps: int = STEPS):
        self.steps = steps
        self.measured: dict[tuple, list[float]] = defaultdict(list)

    @classmethod
    def of(cls, finished: Mapping[Run, Mapping[str, Any]], steps: int = STEPS) -> Estimate:
        estimate = cls(steps)
        for run, record in finished.items():
            estimate.add(run, record["seconds"])
        return estimate

    def add(self, run: Run, seconds: float) -> None:
        self.measured[self._kind(run)].append(seconds)

    def seconds(self, run: Run) -> float:
        if values := self.measured.get(self._kind(run)):
            return sum(values) / len(values)
        method, steps, watched = self._kind(run)
        return steps * STEP.get(method, 0.0) + TESTS + WATCHING * watched

    def left(self, runs: Iterable[Run], workers: int) -> float:
        runs = list(runs)
        longest = max(map(self.seconds, runs), default=0.0)
        return max(sum(map(self.seconds, runs)) / workers, longest)

    def _kind(self, run: Run) -> tuple[str, int, bool]:
        """Method, with the task where completions are sampled; number of steps; whether it is tested on the way."""
        if run == BASE_RUN:
            return "base", 0, False
        steps = run.recipe.options.get("max_steps", self.steps)
        return "sft" if run.recipe.is_sft else f"grpo on {run.task}", steps, run.arm in ("sft", "grpo-mean")


def spelt(seconds: float) -> str:
    """Such as "40 s", "12 min" or "3.5 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
