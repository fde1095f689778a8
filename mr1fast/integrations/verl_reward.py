"""Our rewards as verl calls them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from mr1fast.options.reward_weights import load_rewards
from mr1fast.rewards.own import Absent, as_numbers


def scorer(weights: Mapping[str, float]) -> Callable[..., dict[str, float]]:
    """verl's compute_score for these rewards: (data_source, solution_str, ground_truth, extra_info) -> a dict.

    The dict has score, the weighted sum, each reward by its name in our metrics, and absent, which is 1 where one of
    them is absent: the score and that reward are 0 then, as verl knows no absent ones. weights: those of
    `TrainConfig.rewards`. Raises UserError for a function that cannot be had.
    """
    rewards = load_rewards(weights)

    def compute_score(
        data_source: str, solution_str: str, ground_truth: str, extra_info: Mapping[str, Any] | None = None, **_: Any
    ) -> dict[str, float]:
        columns = json.loads((extra_info or {}).get("columns") or "{}")
        lists = {name: [value] for name, value in columns.items()}
        values: dict[str, float] = {}
        for reward in rewards:
            try:
                (values[reward.name],) = as_numbers(reward.function([solution_str], [ground_truth], **lists), 1)
            except Absent:
                values[reward.name] = math.nan
        absent = any(map(math.isnan, values.values()))
        total = 0.0 if absent else sum(reward.weight * values[reward.name] for reward in rewards)
        values = {name: 0.0 if math.isnan(value) else value for name, value in values.items()}
        return {"score": total, **values, "absent": float(absent)}

    return compute_score
