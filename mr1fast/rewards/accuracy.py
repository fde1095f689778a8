"""Is the answer of a completion right?"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from mr1fast.errors import UserError
from mr1fast.rewards import worker
from mr1fast.rewards.answers import needs_math_verify, same_answer

_TAG = re.compile("</?(?:think|answer)>")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


def accuracy_reward(completion: str, solution: str, *, choices: Sequence[str] | None = None) -> float:
    """1.0 if the tagged answer of `completion` says the same as `solution` (with or without tags), else 0.0.

    choices: the texts of the choices A, B, ... if there are any. docs/answers.md has the rule. Never hangs; raises
    UserError if math-verify is needed and is broken.
    """
    answer, tagged = extract_answer(completion), extract_answer(solution)
    if not answer:
        return 0.0
    try:
        return float(same_answer(answer, solution.strip() if tagged is None else tagged, choices))
    except worker.Unanswered:
        return 0.0


def is_right_untagged(completion: str, solution: str, *, choices: Sequence[str] | None = None) -> bool:
    """Whether a completion without a tagged answer ends in one that is right: its last line, or the last number there.

    The rewards and the accuracy that papers report ask for tags. This tells a model that cannot answer from one that
    answers in another form than it was asked to.
    """
    lines = [line.strip() for line in _TAG.sub("\n", completion).splitlines() if line.strip()]
    if extract_answer(completion) or not lines:
        return False
    ends = [lines[-1], *_NUMBER.findall(lines[-1])[-1:]]
    return any(accuracy_reward(f"<answer>{end}</answer>", solution, choices=choices) > 0 for end in ends)


def extract_answer(text: str) -> str | None:
    """What stands in `<answer>...</answer>`, stripped: the first integer so tagged, else the first of any kind."""
    before_closing = [part for part in text.split("</answer>")[:-1] if "<answer>" in part]
    answers = [part.rpartition("<answer>")[2].strip() for part in before_closing]
    # R1-V's evaluation of counting: an integer between answer tags, wherever they are, is the answer.
    return next((answer for answer in answers if answer.isdecimal()), answers[0] if answers else None)


def check_solutions(solutions: Iterable[str]) -> None:
    """Raises UserError if a solution is a formula that only math-verify can compare, and that is not installed."""
    if worker.missing() is None:
        return
    for solution in solutions:
        if needs_math_verify(solution):
            raise UserError(
                f"the solution {solution!r} is not a plain number and needs the package '{worker.missing()}', which is "
                f"not installed: pip install {worker.missing()}"
            )
