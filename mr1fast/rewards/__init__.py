"""When is an answer right?"""

from collections.abc import Callable

from mr1fast.rewards.accuracy import accuracy_reward, check_solutions, extract_answer
from mr1fast.rewards.format import format_reward
from mr1fast.rewards.worker import unanswered, unanswered_summary

# What --reward-weights can name: functions of completion, solution and the choices, if the row has any.
REWARDS: dict[str, Callable[..., float]] = {
    "accuracy": lambda completion, solution, choices=None: accuracy_reward(completion, solution, choices=choices),
    "format": lambda completion, solution, choices=None: format_reward(completion),
}

__all__ = [
    "REWARDS",
    "accuracy_reward",
    "check_solutions",
    "extract_answer",
    "format_reward",
    "unanswered",
    "unanswered_summary",
]
