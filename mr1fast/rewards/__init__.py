"""When is an answer right?"""

from collections.abc import Callable, Sequence
from typing import Any

from mr1fast.rewards.accuracy import accuracy_reward, check_solutions, extract_answer, is_right_untagged
from mr1fast.rewards.format import format_reward
from mr1fast.rewards.own import RewardFunction
from mr1fast.rewards.r1v import judged_as_r1v, r1v_counting, r1v_geometry
from mr1fast.rewards.worker import unanswered, unanswered_summary


def _accuracy(
    completions: list[str], solutions: list[str], *, choices: Sequence[Sequence[str] | None] | None = None, **_: Any
) -> list[float | None]:
    of_each = choices or [None] * len(completions)
    return [accuracy_reward(*pair, choices=own) for *pair, own in zip(completions, solutions, of_each, strict=True)]


def _of_each(function: Callable[[str, str], float]) -> RewardFunction:
    return lambda completions, solutions, **_: [function(*pair) for pair in zip(completions, solutions, strict=True)]


# What --reward-weights can name beside functions of the user's own, which have the same form: `own` describes it.
REWARDS: dict[str, RewardFunction] = {
    "accuracy": _accuracy,
    "format": _of_each(lambda completion, solution: format_reward(completion)),
    "r1v-counting": _of_each(r1v_counting),
    "r1v-geometry": _of_each(r1v_geometry),
}

__all__ = [
    "REWARDS",
    "accuracy_reward",
    "check_solutions",
    "extract_answer",
    "format_reward",
    "is_right_untagged",
    "judged_as_r1v",
    "unanswered",
    "unanswered_summary",
]
