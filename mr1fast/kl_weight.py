"""The dynamic KL weight of GRPO-D (OThink-MR1, arXiv 2503.16081, Eq. 3) and its alternatives."""

from __future__ import annotations

import math
from collections.abc import Callable

from mr1fast.choices import not_one_of

SCHEDULES = ("paper", "linear", "constant", "cosine", "exponential")
ALL_SCHEDULES = (*SCHEDULES, "adaptive")  # which has state, so that only a KLSchedule can be it
_STATE = ("step", "value")


def kl_weight(
    step: int,
    total_steps: int,
    *,
    beta_min: float,
    beta_max: float,
    schedule: str = "paper",
    explore_fraction: float = 0.3,
) -> float:
    """KL weight (beta) after `step` optimizer steps of `total_steps`; with p = clamp(step / total_steps, 0, 1):

    - `paper`: Eq. 3. From the middle (beta_min + beta_max) / 2 down to beta_min over the first
      `explore_fraction * total_steps` steps (unrounded), then up to beta_max at the end.
    - `linear`: beta_min + (beta_max - beta_min) p
    - `cosine`: beta_min + (beta_max - beta_min) (1 - cos(pi p)) / 2
    - `exponential`: beta_min + (beta_max - beta_min) (e^(5p) - 1) / (e^5 - 1)
    - `constant`: beta_max, which is plain GRPO

    The first update has step 0. Raises ValueError for total_steps < 1, a negative step, beta_min > beta_max, a negative
    beta, explore_fraction outside [0, 1), or an unknown schedule.
    """
    _check(total_steps, beta_min, beta_max, explore_fraction)
    if step < 0:
        raise ValueError(f"step must be >= 0 (optimizer steps completed), got {step}")
    p = min(step / total_steps, 1.0)
    span = beta_max - beta_min
    if schedule == "paper":
        if p <= explore_fraction and explore_fraction > 0:
            middle = (beta_min + beta_max) / 2
            return middle - (middle - beta_min) * p / explore_fraction
        return beta_min + span * (p - explore_fraction) / (1 - explore_fraction)
    if schedule == "linear":
        return beta_min + span * p
    if schedule == "cosine":
        return beta_min + span * (1 - math.cos(math.pi * p)) / 2
    if schedule == "exponential":
        return beta_min + span * math.expm1(5 * p) / math.expm1(5)
    if schedule == "constant":
        return beta_max
    adaptive = "; 'adaptive' needs the state of a KLSchedule" if schedule == "adaptive" else ""
    raise ValueError(not_one_of("schedule", schedule, SCHEDULES) + adaptive)


class KLSchedule:
    """The KL weight as an object with state: call `.step()` once per optimizer step, read `.value`.

    Args:
        total_steps: optimizer steps of the whole run, >= 1.
        beta_min, beta_max: bounds of the weight, 0 <= beta_min <= beta_max.
        schedule: a name of `kl_weight`; a callable of (step, total_steps) -> float; or "adaptive", the target-KL
            controller of Ziegler et al. (arXiv 1909.08593): starting from the middle of the bounds,
            value *= 1 + clip(kl / target_kl - 1, -0.2, 0.2) * n_steps / horizon, clamped to [beta_min, beta_max].
        explore_fraction: w / t of Eq. 3, in [0, 1).
        target_kl: required by "adaptive", > 0, in nats per token; `update(current_kl, n_steps)` feeds it.
        horizon: "adaptive"'s time constant, in the unit of n_steps.

    `step` counts steps for every schedule; `update` moves "adaptive" only, and is safe to call with any other.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        beta_min: float,
        beta_max: float,
        schedule: str | Callable[[int, int], float] = "paper",
        explore_fraction: float = 0.3,
        target_kl: float | None = None,
        horizon: int = 10000,
    ):
        _check(total_steps, beta_min, beta_max, explore_fraction)
        if not callable(schedule) and schedule not in ALL_SCHEDULES:
            raise ValueError(not_one_of("schedule", schedule, ALL_SCHEDULES))
        if schedule == "adaptive" and not (target_kl and target_kl > 0):
            raise ValueError(f"target_kl must be > 0 for schedule='adaptive', got {target_kl}")
        if not horizon > 0:
            raise ValueError(f"horizon must be > 0, got {horizon}")
        self.total_steps = total_steps
        self.beta_min, self.beta_max = beta_min, beta_max
        self.schedule = schedule
        self.explore_fraction = explore_fraction
        self.target_kl, self.horizon = target_kl, horizon
        self.steps_done = 0
        self._adaptive_value = (beta_min + beta_max) / 2

    @property
    def value(self) -> float:
        """The weight of the next update."""
        if callable(self.schedule):
            return float(self.schedule(self.steps_done, self.total_steps))
        if self.schedule == "adaptive":
            return self._adaptive_value
        return kl_weight(
            self.steps_done,
            self.total_steps,
            beta_min=self.beta_min,
            beta_max=self.beta_max,
            schedule=self.schedule,
            explore_fraction=self.explore_fraction,
        )

    def step(self) -> float:
        """Count one optimizer step and return the weight of the next."""
        self.steps_done += 1
        return self.value

    def update(self, current_kl: float, n_steps: int) -> None:
        """Tell the measured mean KL per token (nats) and how many steps it stands for (verl's controller interface)."""
        if self.target_kl and self.schedule == "adaptive" and math.isfinite(current_kl):
            error = min(max(current_kl / self.target_kl - 1, -0.2), 0.2)
            value = self._adaptive_value * (1 + error * n_steps / self.horizon)
            self._adaptive_value = min(max(value, self.beta_min), self.beta_max)

    def state_dict(self) -> dict[str, float]:
        return {"step": self.steps_done, "value": self._adaptive_value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        if missing := [key for key in _STATE if key not in state]:
            raise ValueError(f"state must hold {list(_STATE)}, but {missing} is missing; it has {sorted(state)}")
        self.steps_done = int(state["step"])
        self._adaptive_value = float(state["value"])


def _check(total_steps: int, beta_min: float, beta_max: float, explore_fraction: float) -> None:
    if not total_steps >= 1:
        raise ValueError(f"total_steps must be >= 1, got {total_steps}")
    if not 0 <= beta_min <= beta_max < math.inf:
        raise ValueError(f"beta_min and beta_max must satisfy 0 <= beta_min <= beta_max, got {beta_min} and {beta_max}")
    if not 0 <= explore_fraction < 1:
        raise ValueError(f"explore_fraction must be in [0, 1), got {explore_fraction}")
