"""From completions to rewards: what each function says, and their weighted sum. An absent reward is NaN."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from mr1fast.data.example import Example
from mr1fast.options.reward_weights import Reward
from mr1fast.rewards.own import Absent, as_numbers

SHOWN = 32  # completions of a step


@dataclass(frozen=True)
class Scored:
    """A completion as loggers show it."""

    example: Example
    completion: str
    rewards: dict[str, float]  # by name, not weighted; NaN where absent
    advantage: float


_absent: Counter[str] = Counter()  # rewards of this program, by name


def score(rewards: Sequence[Reward], completions: Sequence[str], examples: Sequence[Example]) -> dict[str, Tensor]:
    """The name of each reward -> its values [B] float32, not weighted; NaN where one is absent, which is counted."""
    solutions = [example.solution for example in examples]
    columns = _columns(examples)
    return {reward.name: torch.tensor(_values(reward, list(completions), solutions, columns)) for reward in rewards}


def weighted_sum(rewards: Sequence[Reward], scores: dict[str, Tensor]) -> Tensor:
    """[B] float32, of the values that `score` returned; NaN where one of them is absent."""
    return torch.stack([reward.weight * scores[reward.name] for reward in rewards]).sum(0)


def first_scored(
    examples: Sequence[Example], completions: Sequence[str], scores: dict[str, Tensor], advantages: Tensor
) -> list[Scored]:
    """The first completions of a step, with what `score` returned and the advantages [B]."""
    return [
        Scored(examples[i], completions[i], {name: values[i].item() for name, values in scores.items()}, advantage)
        for i, advantage in enumerate(advantages[:SHOWN].tolist())
    ]


def absent_summary() -> str:
    """One line for the end of a program; "" if no reward was absent."""
    if not _absent:
        return ""
    listed = ", ".join(f"{count} x {name}" for name, count in _absent.items())
    return f"{listed}: absent rewards, whose completions had no advantage"


def _columns(examples: Sequence[Example]) -> dict[str, list]:
    """What reward functions take beside completions and solutions."""
    names = dict.fromkeys(name for example in examples for name in example.reward_columns())
    rows = [example.reward_columns() for example in examples]
    return {name: [row.get(name) for row in rows] for name in names}


def _values(reward: Reward, completions: list[str], solutions: list[str], columns: dict[str, list]) -> list[float]:
    n = len(completions)
    try:
        values = as_numbers(reward.function(completions, solutions, **columns), n)
        reason = "returned no number"
    except Absent as error:
        values, reason = [math.nan] * n, str(error)
    if absent := sum(map(math.isnan, values)):
        if reward.name not in _absent:
            said = f"the reward {reward.name} {reason}, for {absent} of {n} completions: it counts as absent"
            tqdm.write(f"warning: {said}; rewards/{reward.name}/absent in the metrics counts them", file=sys.stderr)
        _absent[reward.name] += absent
    return values
