"""When is an answer right?"""

from mr1fast.rewards.accuracy import accuracy_reward, check_solutions, extract_answer
from mr1fast.rewards.format import format_reward
from mr1fast.rewards.worker import unanswered, unanswered_summary

__all__ = [
    "accuracy_reward",
    "check_solutions",
    "extract_answer",
    "format_reward",
    "unanswered",
    "unanswered_summary",
]
