"""The learning rate's schedule. Imports no torch."""

from __future__ import annotations


def learning_rate_at(step: int, *, peak: float, max_steps: int, warmup_steps: int) -> float:
    """The rate of the update after `step` finished ones: a linear rise, then a linear fall to 0, like TRL's default."""
    rise = (step + 1) / (warmup_steps + 1)
    fall = (max_steps - step) / max(max_steps - warmup_steps, 1)
    return peak * min(rise, fall, 1.0)
