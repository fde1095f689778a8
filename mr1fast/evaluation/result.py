"""What an evaluation found: the figures, and every sample behind them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """The greedy completion of one problem, and how the sampled ones did."""

    index: int  # in the data set, which has the image
    name: str
    problem: str
    solution: str
    completion: str
    answer: str | None  # what stands between the tags
    correct: bool
    formatted: bool
    sampled_correct: tuple[bool, ...]


@dataclass(frozen=True)
class EvalResult:
    """Fractions over n problems: of greedy completions, but for `sampled_accuracy`, which is NaN without samples.

    accuracy_when_formatted: greedy accuracy among the well-formed completions, 0 if there are none. It tells a model
    that has learnt to answer from one that has learnt to write tags.
    """

    greedy_accuracy: float
    sampled_accuracy: float
    format_accuracy: float
    accuracy_when_formatted: float
    n: int
    samples: list[Sample]

    @classmethod
    def of(cls, samples: list[Sample]) -> EvalResult:
        sampled = [correct for sample in samples for correct in sample.sampled_correct]
        return cls(
            greedy_accuracy=_mean([s.correct for s in samples]),
            sampled_accuracy=_mean(sampled) if sampled else math.nan,
            format_accuracy=_mean([s.formatted for s in samples]),
            accuracy_when_formatted=_mean([s.correct for s in samples if s.formatted]),
            n=len(samples),
            samples=samples,
        )

    def figures(self) -> dict[str, float]:
        """What can stand in a JSON file: all but the samples, and no NaN."""
        numbers = {name: value for name, value in vars(self).items() if name != "samples"}
        return {name: value for name, value in numbers.items() if not math.isnan(value)}

    def by_answer(self) -> dict[str, tuple[int, int]]:
        """True answer -> (greedy completions that were right, problems), in the answers' order."""
        asked = Counter(sample.solution for sample in self.samples)
        right = Counter(sample.solution for sample in self.samples if sample.correct)
        return {solution: (right[solution], asked[solution]) for solution in sorted(asked, key=_numbers_first)}

    def confusions(self, most: int = 8) -> list[tuple[str, str, int]]:
        """The mistakes made more than once, most frequent first: (true answer, what the model said, times)."""
        wrong = Counter((s.solution, s.answer or "no answer") for s in self.samples if not s.correct)
        return [(truth, said, times) for (truth, said), times in wrong.most_common(most) if times > 1]


def wilson_interval(accuracy: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a fraction observed in n trials; z = 1.96 for 95 %.

    Unlike the normal one it stays in [0, 1], and is not empty at 0 and 1.
    """
    centre = (accuracy + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(accuracy * (1 - accuracy) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values) if values else 0.0


def _numbers_first(answer: str) -> tuple[int, float, str]:
    try:
        return (0, float(answer), answer)
    except ValueError:
        return (1, 0.0, answer)
