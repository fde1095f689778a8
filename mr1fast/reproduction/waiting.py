"""Which arm a process runs next."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable

from mr1fast.reproduction.experiments import Run
from mr1fast.reproduction.seconds import Estimate


class Waiting:
    """Arms that wait for a process, each of which stays with a task and a seed, whose prompts it has encoded."""

    def __init__(self, runs: Iterable[Run], estimate: Estimate):
        """runs: seed by seed."""
        self.runs, self.estimate = [*runs], estimate

    def take(self, last: Run | None, busy: Collection[Run]) -> Run:
        """For a process that has run `last`, while others run `busy`; there must be one.

        Of the same task and seed, or else of the first ones at which nobody is, or of those with most left to do for
        each process. Of these the longest, so that all processes have work until about the same time.
        """
        groups, at = defaultdict(list), Counter(map(_prompts, busy))
        for run in self.runs:
            groups[_prompts(run)].append(run)

        def rank(group: tuple[int, str]) -> tuple[bool, bool, float]:
            own = last is not None and group == _prompts(last)
            left = sum(map(self.estimate.seconds, groups[group]))
            return not own, at[group] > 0, -left / (1 + at[group]) if at[group] else 0.0

        run = max(groups[min(groups, key=rank)], key=self.estimate.seconds)
        self.runs.remove(run)
        return run


def _prompts(run: Run) -> tuple[int, str]:
    return run.seed, run.task
