"""When is an answer right?"""

from collections.abc import Callable

from mr1fast.rewards.accuracy import accuracy_reward, check_solutions, extract_answer, format_reward

# What --reward-weights can name: functions of (completion, solution).
REWARDS: dict[str, Callable[[str, str], float]] = {
    "accuracy": accuracy_reward,
    "format": lambda completion, solution: format_reward(completion),
}

__all__ = ["REWARDS", "accuracy_reward", "check_solutions", "extract_answer", "format_reward"]
