"""What is compared: each arm trains one model on one task, and differs from the others in what its name says.

All arms of a task have the same prompts in the same order, the same rate and the same number of steps. The setting was
chosen in a study on a seed of its own (100), before any of the seeds that are reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from mr1fast.losses.kl_weight import kl_weight
from mr1fast.training.learning_rate import learning_rate_at

STEPS = 60
# Of `mr1fast.train`, for every arm; learning rates are those of the tasks' recipes.
SETTING: dict[str, Any] = {
    "max_steps": STEPS,
    "prompts_per_step": 16,
    "num_generations": 8,
    "max_completion_length": 20,
    "warmup_steps": 5,
}
TRAIN_SAMPLES = {"vc": 100, "gr": 400}  # few-shot: drawings, by the seed
# Ten times the paper's weights: in a run this short the paper's own are too small to matter.
BETA_MAX = 0.5


@dataclass(frozen=True)
class Test:
    """A split to test on, with the largest number of problems."""

    task: str
    split: str
    title: str
    problems: int = 300

    @property
    def name(self) -> str:
        return f"{self.task}/{self.split}"


VEHICLES = Test("vc", "vehicles", "VC: vehicles")
SHAPES = Test("vc", "test", "VC in domain: shapes")
FAR = Test("vc", "far", "VC, far shift")
ANGLES = Test("gr", "test", "GR", 200)
TESTS = (VEHICLES, ANGLES, SHAPES, FAR)
TEST_OF = {"vc": VEHICLES, "gr": ANGLES}  # the paper's test of a task
OTHER = {"vc": "gr", "gr": "vc"}
TITLES = {"vc": "VC", "gr": "GR"}


def tests_of(task: str) -> tuple[Test, ...]:
    """Of a model that is trained on this task: in and out of its domain, and the test of the other task."""
    return tuple(test for test in TESTS if test.task == task or test == TEST_OF[OTHER[task]])


@dataclass(frozen=True)
class Arm:
    """How a model is trained. options: of `mr1fast.train`, beside the setting's. twist: see `train.TWISTS`."""

    name: str
    label: str
    options: Mapping[str, Any] = field(default_factory=dict)
    twist: str = ""

    @property
    def is_sft(self) -> bool:
        return self.options.get("method") == "sft"


BASE = Arm("base", "base, not trained")


def _constant(beta: float) -> dict[str, Any]:
    return {"method": "grpo", "beta": beta}


def dynamic(beta_max: float = BETA_MAX, **more: Any) -> dict[str, Any]:
    return {"method": "grpo-d", "beta_min": 0.0, "beta_max": beta_max, **more}


def _weights(steps: int) -> list[float]:
    return [kl_weight(step, steps, beta_min=0.0, beta_max=BETA_MAX) for step in range(steps)]


@cache
def mean_weight(steps: int = STEPS) -> float:
    """Eq. 3's mean over the steps: 0.21 with BETA_MAX."""
    return sum(_weights(steps)) / steps


@cache
def rated_weight() -> float:
    """Eq. 3's mean, each step counted by its learning rate, which falls while the weight rises."""
    warmup = SETTING["warmup_steps"]
    rates = [learning_rate_at(step, peak=1.0, max_steps=STEPS, warmup_steps=warmup) for step in range(STEPS)]
    return sum(rate * weight for rate, weight in zip(rates, _weights(STEPS))) / sum(rates)


def _alpha(alpha: float) -> Arm:
    options = {**_constant(mean_weight()), "reward_weights": f"accuracy=1,format={alpha:g}"}
    return Arm(f"alpha-{alpha:g}", f"α = {alpha:g}", options)


def _pair(name: str, what: str, twist: str = "", **options: Any) -> list[Arm]:
    """GRPO and GRPO-D under the same circumstances."""
    mean = mean_weight(options.get("max_steps", STEPS))
    return [
        Arm(f"{name}-grpo", f"GRPO, {what}", {**_constant(mean), **options}, twist),
        Arm(f"{name}-grpo-d", f"GRPO-D, {what}", dynamic(**options), twist),
    ]


_ARMS = [
    Arm("sft", "SFT on answers", {"method": "sft"}),
    Arm("sft-reasoning", "SFT with reasoning", {"method": "sft", "sft_reasoning": True}),
    *(Arm(f"grpo-{beta:g}", f"GRPO, β = {beta:g}", _constant(beta)) for beta in (0, 0.04, 0.1, 0.5, 1)),
    Arm("grpo-mean", "GRPO, β = Eq. 3's mean", _constant(mean_weight())),
    Arm("grpo-d", "GRPO-D, Eq. 3", dynamic()),
    Arm("reversed", "Eq. 3 backwards", dynamic(kl_schedule="reversed")),
    Arm("grpo-rated", "GRPO, β = Eq. 3's mean weighted by the rate", _constant(rated_weight())),
    Arm("grpo-d-constant-rate", "GRPO-D, constant rate", dynamic(), "constant-rate"),
    Arm("grpo-mean-constant-rate", "GRPO at the mean, constant rate", _constant(mean_weight()), "constant-rate"),
    Arm("tags", "tags rewarded alone", {**_constant(mean_weight()), "reward_weights": "format=1"}),
    *(_alpha(alpha) for alpha in (0, 0.25, 0.75, 1)),
    # Beyond the paper: where the schedule could matter, and nobody has looked. Written down before any was run.
    *_pair("reuse", "4 updates per batch", num_iterations=4),
    *_pair("noise", "a fifth of the answers wrong", "noise"),
    *_pair("long", "300 steps", max_steps=300),
    *_pair("hack", "format rewarded 4 times as much", reward_weights="accuracy=1,format=4"),
    Arm("closed-loop", "β rises with the batch's accuracy", dynamic(), "closed-loop"),
    Arm("adaptive", "β aims for a KL of 0.1", dynamic(kl_schedule="adaptive", target_kl=0.1)),
]
ARMS: dict[str, Arm] = {arm.name: arm for arm in _ARMS}


def label(name: str) -> str:
    """Of an arm or the base; also of weights that only the paper's own experiments have."""
    if name == BASE.name:
        return BASE.label
    if name in ARMS:
        return ARMS[name].label
    kind, _, number = name.partition("-")
    return f"GRPO, β = {number}" if kind == "grpo" else f"α = {number}"
