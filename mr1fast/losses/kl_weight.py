"""The dynamic KL weight of GRPO-D (OThink-MR1, arXiv 2503.16081, Eq. 3) and its alternatives.

A schedule is a function and its entry in `SCHEDULES`, from which the programs' options, help and errors are made.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

from mr1fast.checks import described, not_one_of, number

_STATE = ("step", "value")


# ---- the schedules: the weight, between the bounds low and high, after the fraction p of all steps -------------------


def _paper(p: float, low: float, high: float, explore_fraction: float) -> float:
    """Eq. 3: down from the middle to the lower bound while exploring, then up to the upper one."""
    if p <= explore_fraction and explore_fraction > 0:
        middle = (low + high) / 2
        return middle - (middle - low) * p / explore_fraction
    return low + (high - low) * (p - explore_fraction) / (1 - explore_fraction)


def _linear(p: float, low: float, high: float) -> float:
    return low + (high - low) * p


def _constant(p: float, low: float, high: float) -> float:
    return float(high)


def _cosine(p: float, low: float, high: float) -> float:
    return low + (high - low) * (1 - math.cos(math.pi * p)) / 2


def _exponential(p: float, low: float, high: float) -> float:
    return low + (high - low) * math.expm1(5 * p) / math.expm1(5)


def _reversed(p: float, low: float, high: float, explore_fraction: float) -> float:
    """Eq. 3 backwards in time."""
    return _paper(1 - p, low, high, explore_fraction)


SCHEDULES: dict[str, Callable[..., float]] = {
    "paper": _paper,
    "linear": _linear,
    "constant": _constant,
    "cosine": _cosine,
    "exponential": _exponential,
    "reversed": _reversed,
}
ALL_SCHEDULES = (*SCHEDULES, "adaptive")  # adaptive has state, so only a KLSchedule can follow it
# Those whose function takes explore_fraction.
EXPLORING = tuple(name for name, form in SCHEDULES.items() if "explore_fraction" in inspect.signature(form).parameters)


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
    - `reversed`: the weight of `paper` at 1 - p

    The first update has step 0. Raises ValueError for total_steps < 1, a negative step, beta_min > beta_max, a negative
    beta, explore_fraction outside [0, 1), or an unknown schedule.
    """
    _check(total_steps, beta_min, beta_max, explore_fraction)
    number("step (optimizer steps completed)", step, at_least=0)
    if not isinstance(schedule, str) or schedule not in SCHEDULES:
        adaptive = "; 'adaptive' needs the state of a KLSchedule" if schedule == "adaptive" else ""
        raise ValueError(not_one_of("schedule", schedule, SCHEDULES) + adaptive)
    explore = {"explore_fraction": explore_fraction} if schedule in EXPLORING else {}
    return SCHEDULES[schedule](min(step / total_steps, 1.0), beta_min, beta_max, **explore)


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
        if schedule == "adaptive" or target_kl is not None:
            number("target_kl (which schedule='adaptive' needs)", target_kl, above=0)
        number("horizon", horizon, above=0)
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
            return number("schedule's result", self.schedule(self.steps_done, self.total_steps), at_least=0)
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
        """Report the measured mean KL per token (nats) and the number of steps it covers (the interface of verl)."""
        number("n_steps", n_steps, at_least=0)
        try:
            current_kl = float(current_kl)  # a 0-d tensor, too
        except (TypeError, ValueError):
            raise ValueError(f"current_kl must be a number, got {described(current_kl)}") from None
        if self.target_kl and self.schedule == "adaptive" and math.isfinite(current_kl):
            error = min(max(current_kl / self.target_kl - 1, -0.2), 0.2)
            self._adaptive_value = self._within_bounds(self._adaptive_value * (1 + error * n_steps / self.horizon))

    def _within_bounds(self, value: float) -> float:
        return float(min(max(value, self.beta_min), self.beta_max))

    def state_dict(self) -> dict[str, float]:
        return {"step": self.steps_done, "value": self._adaptive_value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        if not isinstance(state, dict) or any(key not in state for key in _STATE):
            raise ValueError(f"state must be a dict with {' and '.join(_STATE)}, got {described(state)}")
        self.steps_done = int(number("state['step']", state["step"], at_least=0))
        self._adaptive_value = self._within_bounds(number("state['value']", state["value"]))


def _check(total_steps: int, beta_min: float, beta_max: float, explore_fraction: float) -> None:
    number("total_steps", total_steps, at_least=1)
    if number("beta_min", beta_min, at_least=0) > number("beta_max", beta_max, at_least=0):
        raise ValueError(f"beta_min and beta_max must satisfy beta_min <= beta_max, got {beta_min} and {beta_max}")
    if not number("explore_fraction", explore_fraction, at_least=0) < 1:
        raise ValueError(f"explore_fraction must be in [0, 1), got {explore_fraction}")
