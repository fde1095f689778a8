"""Steps that change no weight: why, and what is kept of them for the user to look at."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from mr1fast.data.example import Example


def useless(rewards: Sequence[float], any_tokens: bool = True) -> str:
    """Why nothing can be learnt from these weighted sums, of which NaN is an absent one; "" if something can.

    any_tokens: whether there are any that count.
    """
    if any(map(math.isinf, rewards)):
        return "a reward is not a finite number"
    if rewards and all(map(math.isnan, rewards)):
        return "no completion has a reward"
    return "" if any_tokens else "every completion was cut off, and --mask-truncated is on"


def skipped_sample(
    step: int, reason: str, examples: Sequence[Example], completions: Sequence[str], rewards: Sequence[float]
) -> dict[str, Any]:
    """The content of skipped/step-N.json: P examples, B completions and their weighted sums of rewards."""
    return {
        "step": step,
        "reason": reason,
        "examples": [_without_images(example) for example in examples],
        "completions": list(completions),
        "rewards": [str(reward) for reward in rewards],  # JSON has no NaN
    }


def _without_images(example: Example) -> dict[str, Any]:
    """The example for a JSON file."""
    return dataclasses.asdict(dataclasses.replace(example, image=None, more_images=(), columns={}))
