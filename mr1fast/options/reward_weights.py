"""--reward-weights and --reward: which rewards are added up, with which weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mr1fast.checks import nearest
from mr1fast.errors import UserError
from mr1fast.rewards import REWARDS
from mr1fast.rewards.own import OwnReward, RewardFunction, renew_process

DEFAULT_REWARDS = "accuracy=1,format=0.5"
# Advantages divide by the rewards' standard deviation + 1e-4; rewards far smaller than that would not count.
LEAST, GREATEST = 1e-6, 1e6


@dataclass(frozen=True)
class Reward:
    """One term of the reward that training maximises."""

    name: str  # in the metrics: rewards/NAME/mean
    weight: float
    function: RewardFunction


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


def add_rewards(text: str, names: Sequence[str]) -> str:
    """--reward-weights with these names of --reward, each with weight 1 unless it is there. Raises UserError."""
    for name in names:
        if not name.strip() or set(name) & set("=,"):
            raise UserError(
                f"--reward takes one name, such as module:function, got {name!r}; weights go to --reward-weights name=1"
            )
        if name not in (part.rpartition("=")[0].strip() for part in text.split(",")):
            text += f",{name}=1"
    return text


def _weight(name: str, text: str, source: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        raise UserError(f"{source}: the weight of {name} must be a number, got {text!r}") from None
    if not math.isfinite(weight) or (weight and not LEAST <= weight <= GREATEST):
        raise UserError(f"{source}: the weight of {name} must be 0, or from {LEAST:g} to {GREATEST:g}, got {text}")
    return weight


def load_rewards(weights: Mapping[str, float]) -> list[Reward]:
    """The functions behind the names; those of the user's are tried. Raises UserError where one cannot be had."""
    renew_process()
    rewards = [
        Reward(f"{name}_reward", weight, REWARDS[name])
        if name in REWARDS
        else Reward(name.partition(":")[2], weight, OwnReward(name))
        for name, weight in weights.items()
    ]
    names = [reward.name for reward in rewards]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--reward-weights: two rewards are called {name!r} in the metrics; rename one of them")
    return rewards


def check_columns(rewards: Iterable[Reward], columns: Iterable[str]) -> None:
    """Raises UserError where a function of the user's takes a column that is not among these."""
    for reward in rewards:
        if isinstance(reward.function, OwnReward):
            reward.function.check_columns(columns)
