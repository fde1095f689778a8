"""A reward for tests/fault_runs.py, in a module of its own, which the process that asks it imports at once."""

import hashlib


def letters(completions, solutions, **_) -> list[float]:
    """It differs within every group, so that every step moves the weights."""
    return [(int(hashlib.sha256(text.encode()).hexdigest(), 16) % 1000) / 1000 for text in completions]
