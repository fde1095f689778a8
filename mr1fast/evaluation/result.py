"""What an evaluation found: each problem with its answers, and the accuracies over all problems."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mr1fast.data.example import Example


@dataclass(frozen=True)
class Answered:
    """A problem with the model's greedy completion, and whether its sampled completions were right."""

    index: int  # in the data set, which has the image; it identifies the problem
    name: str
    problem: str
    solution: str
    completion: str
    answer: str | None  # what stands between the tags
    correct: bool
    formatted: bool
    sampled_correct: tuple[bool, ...]
    right_untagged: bool = False  # there are no answer tags, but the completion ends in the right answer
    correct_as_r1v: bool | None = None  # None: not judged

    @property
    def right_anyhow(self) -> bool:
        return self.correct or self.right_untagged

    def answers(self, example: Example, sampled: int) -> bool:
        """Whether this very problem was answered, and so many completions of it sampled."""
        asked = (example.name, example.problem, example.solution, sampled)
        return (self.name, self.problem, self.solution, len(self.sampled_correct)) == asked


@dataclass(frozen=True)
class EvalResult:
    """Fractions over n problems, of greedy completions except `sampled_accuracy`, which is NaN if none was sampled.

    anyhow_accuracy: greedy accuracy whether or not the answer is in tags, which `greedy_accuracy` asks for: it tells a
    model that has learnt to answer from one that has learnt to write tags. accuracy_when_formatted: greedy accuracy
    among the well-formed completions, 0 if there are none. accuracy_as_r1v: greedy accuracy as R1-V's
    evaluations count it, NaN where not every completion has been judged so.
    """

    greedy_accuracy: float
    anyhow_accuracy: float
    sampled_accuracy: float
    format_accuracy: float
    accuracy_when_formatted: float
    accuracy_as_r1v: float
    n: int
    answered: list[Answered]

    @classmethod
    def of(cls, answered: list[Answered]) -> EvalResult:
        sampled = [correct for one in answered for correct in one.sampled_correct]
        as_r1v = [one.correct_as_r1v for one in answered if one.correct_as_r1v is not None]
        return cls(
            greedy_accuracy=_mean([one.correct for one in answered]),
            anyhow_accuracy=_mean([one.right_anyhow for one in answered]),
            sampled_accuracy=_mean(sampled) if sampled else math.nan,
            format_accuracy=_mean([one.formatted for one in answered]),
            accuracy_when_formatted=_mean([one.correct for one in answered if one.formatted]),
            accuracy_as_r1v=_mean(as_r1v) if len(as_r1v) == len(answered) else math.nan,
            n=len(answered),
            answered=answered,
        )

    def figures(self) -> dict[str, float]:
        """The numbers for a JSON file: everything but the problems, without NaN."""
        numbers = {name: value for name, value in vars(self).items() if name != "answered"}
        return {name: value for name, value in numbers.items() if not math.isnan(value)}

    def by_answer(self) -> dict[str, tuple[int, int]]:
        """True answer -> (greedy completions that were right, problems), in the answers' order."""
        asked = Counter(one.solution for one in self.answered)
        right = Counter(one.solution for one in self.answered if one.correct)
        return {solution: (right[solution], asked[solution]) for solution in sorted(asked, key=_numbers_first)}

    def confusions(self, most: int = 8) -> list[tuple[str, str, int]]:
        """The mistakes made more than once, most frequent first: (true answer, what the model said, times)."""
        wrong = Counter((one.solution, one.answer or "no answer") for one in self.answered if not one.correct)
        return [(truth, said, times) for (truth, said), times in wrong.most_common(most) if times > 1]


def wilson_interval(accuracy: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a fraction observed in n independent trials; z = 1.96 for 95 %.

    Unlike the normal approximation's it stays in [0, 1], and does not shrink to a point at 0 and 1.
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
