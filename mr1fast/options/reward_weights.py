"""--reward-weights: which rewards are added up, with which weights."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mr1fast.checks import nearest
from mr1fast.errors import UserError
from mr1fast.rewards import REWARDS

DEFAULT_REWARDS = "accuracy=1,format=0.5"
# Advantages divide by the rewards' standard deviation + 1e-4; rewards far smaller than that would not count.
LEAST, GREATEST = 1e-6, 1e6


@dataclass(frozen=True)
class Reward:
    """One term of the reward that training maximises."""

    name: str  # in the metrics: rewards/NAME/mean
    weight: float
    function: Callable[..., float]  # (completion, solution, choices) -> reward


def parse_reward_weights(text: str, source: str) -> dict[str, float]:
    """Name -> weight of "accuracy=1,format=0.5"; a weight of 0 leaves the reward out. Raises UserError."""
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, equals, weight = (piece.strip() for piece in part.rpartition("="))
        if not equals or not name:
            raise UserError(
                f"{source} must be name=weight, separated by commas, such as {DEFAULT_REWARDS}, got {text!r}"
            )
        if name not in REWARDS and ":" not in name:
            known = f"{', '.join(REWARDS)}, or a function of your own as module:function"
            raise UserError(f"{source}: a reward must be one of {known}, got {name!r}{nearest(name, REWARDS)}")
        if name in weights:
            raise UserError(f"{source} names {name} twice")
        weights[name] = _weight(name, weight, source)
    if not any(weights.values()):
        raise UserError(f"{source} {text}: every weight is 0, so nothing would be rewarded")
    return {name: weight for name, weight in weights.items() if weight}


def _weight(name: str, text: str, source: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        raise UserError(f"{source}: the weight of {name} must be a number, got {text!r}") from None
    if not math.isfinite(weight) or (weight and not LEAST <= weight <= GREATEST):
        raise UserError(f"{source}: the weight of {name} must be 0, or from {LEAST:g} to {GREATEST:g}, got {text}")
    return weight


def load_rewards(weights: Mapping[str, float]) -> list[Reward]:
    """The functions behind the names; the user's own are imported. Raises UserError if one cannot be imported."""
    rewards = [
        Reward(f"{name}_reward", weight, REWARDS[name])
        if name in REWARDS
        else Reward(name.partition(":")[2], weight, _imported(name))
        for name, weight in weights.items()
    ]
    names = [reward.name for reward in rewards]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--reward-weights: two rewards are called {name!r} in the metrics; rename one of them")
    return rewards


def _imported(name: str) -> Callable[..., float]:
    """A function of (completion, solution)."""
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:  # an installed command does not look there, python -m does
        sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever the user's module raises
        reason = str(error).partition("\n")[0]
        raise UserError(f"--reward-weights: {name} cannot be imported: {type(error).__name__}: {reason}") from error
    if not callable(function):
        raise UserError(f"--reward-weights: {name} is not a function, but of type {type(function).__name__}")
    return lambda completion, solution, choices=None: function(completion, solution)
