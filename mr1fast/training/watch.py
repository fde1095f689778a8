"""What in a run's metrics its owner should look at: one sentence for each thing that has probably gone wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

WINDOW = 20  # the latest steps, of which a warning speaks
LOOKED_AT = 1000  # steps, these and those before: a longer run must not become slower for it
RUNAWAY = 10.0  # times what it was in the steps before these
LARGE_KL = 0.5  # nats per token; below that, ten times as much is no harm yet


@dataclass(frozen=True)
class Warned:
    """is_wrong: of the metric's values in the latest steps and in those before, oldest first."""

    metric: str  # its name in metrics.jsonl
    is_wrong: Callable[[list[float], list[float]], bool]
    sentence: str  # what was seen, and what to do; {value} is the mean of the latest


def _all_same(latest: list[float], before: list[float]) -> bool:
    return max(latest) == min(latest)


def _runs_away(latest: list[float], before: list[float]) -> bool:
    return len(before) >= WINDOW and median(latest) > RUNAWAY * median(before) > 0


WARNINGS = (
    Warned(
        "reward",
        _all_same,
        "the reward was {value:.3g} in every one of the last steps: is the reward function right, and the task not too "
        "hard or too easy?",
    ),
    Warned(
        "frac_reward_zero_std",
        lambda latest, before: min(latest) == 1,
        "in every group all completions had the same reward, so nothing was learned from them: easier or harder "
        "problems, a larger --num-generations or a higher --temperature make them differ.",
    ),
    Warned(
        "rewards/format_reward/mean",
        lambda latest, before: max(latest) == 0,
        "no completion was well formed: does the prompt ask for the tags, and is --max-completion-length long enough?",
    ),
    Warned(
        "completions/clipped_ratio",
        lambda latest, before: min(latest) > 0.99,
        "every completion was cut off at --max-completion-length: a longer one, or a model that ends its answers, is "
        "needed.",
    ),
    Warned(
        "kl",
        lambda latest, before: fmean(latest) > LARGE_KL and _runs_away(latest, before),
        "the KL divergence runs away from the base model, to {value:.3g} nats per token: a larger KL weight (--beta, "
        "--beta-max) or a lower --learning-rate holds it.",
    ),
    Warned(
        "grad_norm",
        _runs_away,
        "the gradient's norm has grown tenfold, to {value:.3g}: a lower --learning-rate or --max-grad-norm calms it.",
    ),
)


def warnings(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Metric -> sentence, for what is wrong in the latest steps of one task's rows of metrics.jsonl (null for NaN)."""
    found = {}
    for warned in WARNINGS:
        values = [value for row in rows if (value := row.get(warned.metric)) is not None and math.isfinite(value)]
        latest, before = values[-WINDOW:], values[:-WINDOW]
        if len(latest) == WINDOW and warned.is_wrong(latest, before):
            found[warned.metric] = warned.sentence.format(value=fmean(latest))
    return found
