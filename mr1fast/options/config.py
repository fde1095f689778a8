"""The trainer's options and their defaults: one frozen dataclass.

Nothing here imports torch, so that a mistake is answered at once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mr1fast.checks import not_one_of
from mr1fast.data.tasks import TASKS
from mr1fast.errors import UserError
from mr1fast.losses.kl_weight import ALL_SCHEDULES

GREATEST = 2**63 - 1  # what torch takes as a whole number
TASK_NAMES = tuple(TASKS)
METHODS = ("grpo-d", "grpo", "sft")

# What an option is when nobody sets it: by task for the embedded model, after R1-V for any other. Local data takes the
# recipe of visual counting.
RECIPES: dict[str, dict[str, Any]] = {
    **{name: task.recipe for name, task in TASKS.items()},
    "model": {"prompts_per_step": 16, "learning_rate": 1e-6, "max_steps": 200, "max_completion_length": 512},
}
KL_DEFAULTS: dict[str, dict[str, Any]] = {
    "grpo-d": {"beta_min": 0.0, "beta_max": 0.04, "kl_schedule": "paper", "explore_fraction": 0.3},
    "grpo": {"beta": 0.04},
    "sft": {},
}


def option(
    default: Any,
    help: str,
    *,
    unit: str = "",
    choices: Sequence[str] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    shown: str | None = None,
) -> Any:
    """A field of TrainConfig; `shown` is the default as --help gives it, where that is not the value itself."""
    bounds = {"at_least": at_least, "above": above, "below": below}
    return field(default=default, metadata={"help": help, "unit": unit, "choices": choices, "shown": shown, **bounds})


def _by_case(name: str) -> str:
    cases = {"vc": "for vc and local data", "model": "with --model"}
    return ", ".join(f"{recipe[name]} {cases.get(case, f'for {case}')}" for case, recipe in RECIPES.items())


def _bounds(split: str) -> str:
    """The number of problems of this split, for the tasks in which it is bounded."""
    return "".join(f"; {name} has {task.splits[split]}" for name, task in TASKS.items() if task.splits[split])


def _of_method(name: str) -> str:
    method = next(method for method, values in KL_DEFAULTS.items() if name in values)
    return f"{KL_DEFAULTS[method][name]}; --method {method} only"


@dataclass(frozen=True)
class TrainConfig:
    """Every option of `python -m mr1fast.train`. None is a default that `for_task` fills in, whatever the type says.

    Raises UserError for a value out of its range and for options that contradict each other.
    """

    method: str = option("grpo-d", "GRPO-D, GRPO with a constant KL weight, or supervised fine-tuning", choices=METHODS)
    task: str | None = option(
        None,
        f"the embedded tasks to train on, one model each: {', '.join(TASKS)} or {','.join(TASKS)}",
        shown=f"{','.join(TASKS)}, or none with --data",
    )
    data: str | None = option(
        None,
        "local data instead of an embedded task: a folder, or a .jsonl, .json, .csv or .parquet file with the columns "
        "image, problem and solution",
        shown="none",
    )
    model: str | None = option(
        None, "a folder (or a name on the Hugging Face hub) with a Qwen2-VL", shown="the embedded one"
    )
    output_dir: str | None = option(None, "the run's folder; never overwritten", shown="runs/<date-time>")
    seed: int = option(0, "of the prompts' order and of sampling", at_least=0)

    num_generations: int = option(8, "completions of a prompt, the group of GRPO", at_least=2)
    prompts_per_step: int = option(
        None, "different prompts of an optimizer step", at_least=1, shown=_by_case("prompts_per_step")
    )
    gradient_accumulation_steps: int = option(
        1, "pieces in which a step's prompts are trained on, to save memory; the gradient is the same", at_least=1
    )
    num_iterations: int = option(1, "optimizer steps on each batch of completions", at_least=1)
    max_steps: int = option(None, "optimizer steps", at_least=1, shown=_by_case("max_steps"))
    max_completion_length: int = option(
        None, "longest completion", unit="tokens", at_least=1, shown=_by_case("max_completion_length")
    )
    max_pixels: int | None = option(
        None, "images are scaled down to this size", unit="pixels", at_least=1, shown="as the model's processor says"
    )
    temperature: float = option(1.0, "of sampling; the loss is taken at the same", above=0)
    accuracy_weight: float = option(1.0, "of the accuracy reward; 0 is the format-only control", at_least=0)
    format_weight: float = option(0.5, "of the format reward (the paper's alpha)", at_least=0)

    beta: float = option(None, "constant KL weight", at_least=0, shown=_of_method("beta"))
    beta_min: float = option(None, "least KL weight", at_least=0, shown=_of_method("beta_min"))
    beta_max: float = option(
        None, "greatest KL weight; with constant, the weight", at_least=0, shown=_of_method("beta_max")
    )
    kl_schedule: str = option(
        None, "how the KL weight goes between them", choices=ALL_SCHEDULES, shown=_of_method("kl_schedule")
    )
    explore_fraction: float = option(
        None,
        "share of the steps in which the paper's schedule explores",
        at_least=0,
        below=1,
        shown=f"{KL_DEFAULTS['grpo-d']['explore_fraction']}; --method grpo-d with --kl-schedule paper only",
    )
    target_kl: float | None = option(
        None,
        "KL divergence from the base that the adaptive schedule steers to",
        unit="nats per token",
        above=0,
        shown="none; needed by --kl-schedule adaptive, and used by it only",
    )

    learning_rate: float = option(None, "AdamW's greatest", above=0, shown=_by_case("learning_rate"))
    warmup_steps: int = option(10, "steps in which the learning rate rises", at_least=0)
    max_grad_norm: float = option(1.0, "longer gradients are shortened to this norm", above=0)

    eval_samples: int = option(400, f"problems of the test split, before and after{_bounds('test')}", at_least=1)
    eval_steps: int = option(50, "steps between evaluations on the validation split; 0 for none", at_least=0)
    eval_validation_samples: int = option(128, f"problems of the validation split{_bounds('validation')}", at_least=1)
    save_steps: int = option(50, "steps between checkpoints; the last step is always saved", at_least=1)
    save_total_limit: int = option(2, "checkpoints that are kept, the newest", at_least=1)

    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto is a GPU where there is one")
    dtype: str = option("auto", "auto is bfloat16 on a GPU, else float32", choices=("auto", "float32", "bfloat16"))
    attention: str = option(
        "auto",
        "auto is FlashAttention 2 where it is installed, else sdpa",
        choices=("auto", "sdpa", "flash_attention_2", "eager"),
    )
    threads: int | None = option(None, "CPU threads", at_least=1, shown="by the model's size")

    def __post_init__(self) -> None:
        for option_field in dataclasses.fields(self):
            check_value(option_field, getattr(self, option_field.name), flag(option_field.name))
        if self.data is not None and self.task is not None:
            raise UserError(f"--task {self.task} and --data {self.data} exclude each other; give one")
        for name in self.tasks:
            choice("--task", name, TASK_NAMES)
        if len(set(self.tasks)) < len(self.tasks):
            raise UserError(f"--task {self.task} names a task twice")
        for method, names in KL_DEFAULTS.items():
            for name in names:
                if method != self.method and getattr(self, name) is not None:
                    raise UserError(f"{flag(name)} belongs to --method {method}, and the method is {self.method}")
        if self.explore_fraction is not None and self.kl_schedule not in (None, "paper"):
            raise UserError(
                f"--explore-fraction belongs to --kl-schedule paper, and the schedule is {self.kl_schedule}"
            )
        if (self.target_kl is not None) != (self.kl_schedule == "adaptive"):
            raise UserError("--target-kl and --kl-schedule adaptive go together; one was given without the other")
        if self.beta_min is not None or self.beta_max is not None:
            bounds = KL_DEFAULTS["grpo-d"] | {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
            if bounds["beta_min"] > bounds["beta_max"]:
                raise UserError(
                    f"--beta-min must not be above --beta-max, got {bounds['beta_min']} and {bounds['beta_max']}"
                )
        if self.accuracy_weight == self.format_weight == 0:
            raise UserError("--accuracy-weight and --format-weight are both 0: nothing would be rewarded")
        if self.num_iterations > 1 and self.method == "sft":
            raise UserError("--num-iterations is for completions that were sampled; --method sft samples none")
        for name in self.tasks or ("data",):
            prompts = self.prompts_per_step or self.for_task(name).prompts_per_step
            if prompts % self.gradient_accumulation_steps:
                raise UserError(
                    "--gradient-accumulation-steps must divide --prompts-per-step, "
                    f"got {self.gradient_accumulation_steps} and {prompts}"
                )

    @property
    def tasks(self) -> tuple[str, ...]:
        """The embedded tasks to train on, in this order; empty with `data`."""
        if self.data is not None:
            return ()
        return TASK_NAMES if self.task is None else tuple(name.strip() for name in self.task.split(","))

    def for_task(self, name: str) -> TrainConfig:
        """This configuration with the defaults of a task (or of "data") filled in."""
        recipe = RECIPES["model" if self.model is not None else name if name in RECIPES else "vc"]
        defaults = {**recipe, **KL_DEFAULTS[self.method]}
        if self.kl_schedule not in (None, "paper"):
            defaults.pop("explore_fraction", None)
        filled = {key: value for key, value in defaults.items() if getattr(self, key) is None}
        return dataclasses.replace(self, **filled)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(not_one_of(name, value, known))


def check_value(option_field: dataclasses.Field, value: Any, name: str) -> None:
    """Raises UserError, in which the option is called `name`, for a value that is out of its range."""
    limits = option_field.metadata
    if value is None:
        return
    if limits["choices"] is not None:
        choice(name, value, limits["choices"])
    if isinstance(value, int) and value > GREATEST:
        raise UserError(f"{name} must be at most {GREATEST}, got {value}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} must be a finite number, got {value}")
    for limit, words, holds in (
        ("at_least", "at least", lambda bound: value >= bound),
        ("above", "above", lambda bound: value > bound),
        ("below", "below", lambda bound: value < bound),
    ):
        bound = limits[limit]
        if bound is not None and not holds(bound):
            raise UserError(f"{name} must be {words} {bound:g}, got {value}")
