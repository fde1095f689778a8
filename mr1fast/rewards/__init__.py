"""When is an answer right?"""

from mr1fast.rewards.accuracy import accuracy_reward, check_solutions, extract_answer, format_reward

__all__ = ["accuracy_reward", "check_solutions", "extract_answer", "format_reward"]
