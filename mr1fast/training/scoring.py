"""From completions to rewards: the value of each reward function, and their weighted sum."""

from __future__ import annotations

import traceback
from collections.abc import Sequence

import torch
from torch import Tensor

from mr1fast.checks import described
from mr1fast.data.example import Example
from mr1fast.errors import UserError
from mr1fast.options.reward_weights import Reward


def score(rewards: Sequence[Reward], completions: Sequence[str], examples: Sequence[Example]) -> dict[str, Tensor]:
    """The unweighted values [B] float32 of each reward, by its name. Raises UserError if a function fails."""
    return {
        reward.name: torch.tensor([_call(reward, *pair) for pair in zip(completions, examples, strict=True)])
        for reward in rewards
    }


def weighted_sum(rewards: Sequence[Reward], scores: dict[str, Tensor]) -> Tensor:
    """[B] float32, of the values that `score` returned."""
    return torch.stack([reward.weight * scores[reward.name] for reward in rewards]).sum(0)


def _call(reward: Reward, completion: str, example: Example) -> float:
    try:
        value = reward.function(completion, example.solution, example.choices)
    except Exception as error:  # whatever a function of the user's raises
        line = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise UserError(f"the reward {reward.name} failed: {reason} ({line.filename}, line {line.lineno})") from error
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"the reward {reward.name} must return a number, got {described(value)}") from None
