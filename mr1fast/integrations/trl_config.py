"""TRL's configuration with the numbers of a KL schedule."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig

from mr1fast.checks import choice
from mr1fast.losses.kl_weight import SCHEDULES, kl_weight


@dataclass
class GRPODConfig(GRPOConfig):
    """TRL's GRPOConfig with the KL weight as a function of the optimizer step, `mr1fast.losses.kl_weight`.

    Without beta_max the weight stays at `beta`, as in TRL. With it, `beta` is left alone or equal to beta_max.
    """

    kl_schedule: str = field(default="paper", metadata={"help": "How the KL weight moves: " + ", ".join(SCHEDULES)})
    beta_min: float | None = field(default=None, metadata={"help": "Lowest KL weight; 0 if only beta_max is given."})
    beta_max: float | None = field(default=None, metadata={"help": "Highest KL weight, the one at the end."})
    explore_fraction: float = field(default=0.3, metadata={"help": "Share of the steps in which 'paper' falls."})

    def __post_init__(self) -> None:
        if self.beta_max is None and self.beta_min is not None:
            raise ValueError(f"beta_max must be given with beta_min ({self.beta_min}), got None")
        if self.beta_max is not None:
            if self.beta not in (0.0, self.beta_max):
                raise ValueError(f"beta must be left out (or be beta_max = {self.beta_max}), got {self.beta}")
            # TRL prepares the reference model where beta is not 0.
            self.beta = self.beta_max
        checked_schedule(self)
        super().__post_init__()


def checked_schedule(args: Any) -> dict[str, Any]:
    """The keywords of `kl_weight`; ValueError, by name, if it would not take them."""
    name = getattr(args, "kl_schedule", "paper")
    if name == "adaptive":
        raise ValueError(f"kl_schedule='adaptive' is not supported in TRL's trainer; use one of {', '.join(SCHEDULES)}")
    choice("kl_schedule", name, SCHEDULES)
    beta_max = getattr(args, "beta_max", None)
    if beta_max is None:
        if name not in ("paper", "constant"):  # the default, and what there is without bounds
            raise ValueError(f"beta_max must be given with kl_schedule={name!r}, got None")
        return {"schedule": "constant", "beta_min": 0.0, "beta_max": args.beta}
    keywords = {
        "schedule": name,
        "beta_min": getattr(args, "beta_min", None) or 0.0,
        "beta_max": beta_max,
        "explore_fraction": getattr(args, "explore_fraction", 0.3),
    }
    kl_weight(0, 1, **keywords)
    return keywords
