"""The trainer's options together: what the user asked for (TrainConfig), and what trains one model (TaskConfig).

Nothing here imports torch, so that a mistake is reported at once.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mr1fast.checks import pairs
from mr1fast.data.columns import Reading
from mr1fast.data.sources import source_of, sources_of
from mr1fast.errors import UserError
from mr1fast.losses.kl_weight import EXPLORING
from mr1fast.options.fields import MANY, check_value, option_string
from mr1fast.options.loss_keywords import parse_loss
from mr1fast.options.prompt import Prompt, chosen_prompt
from mr1fast.options.reading import read_as
from mr1fast.options.recipes import (
    KL_DEFAULTS,
    R1_V,
    RECIPES,
    TASK_NAMES,
    adapter_base,
    default_eval_batch_size,
    default_pieces,
    lora_learning_rate,
    recipe_name,
)
from mr1fast.options.reward_weights import parse_reward_weights
from mr1fast.options.together import check_together
from mr1fast.options.train_options import BY_TASK, TrainOptions


@dataclass(frozen=True)
class TrainConfig(TrainOptions):
    """The options as the user set them; None for an option that was not set.

    Raises UserError for a value out of its range and for options that contradict each other.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            for each in value.values() if isinstance(value, Mapping) else [value]:
                if each is not None:
                    check_value(field, each, option_string(field.name))
        check_together(self)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The embedded tasks to train on, in this order; empty with `data`."""
        if self.data is not None:
            return ()
        return TASK_NAMES if self.task is None else tuple(name.strip() for name in self.task.split(","))

    @property
    def frozen_parts(self) -> tuple[str, ...]:
        return () if self.freeze is None else tuple(part.strip() for part in self.freeze.split(","))

    @property
    def loggers(self) -> tuple[str, ...]:
        names = tuple(name.strip() for name in self.report_to.split(","))
        return () if names == ("none",) else names

    @property
    def trains_adapter(self) -> bool:
        """Whether an adapter is trained: a new one, or the one that --model is."""
        return self.lora_rank is not None or (self.model is not None and adapter_base(self.model) is not None)

    @property
    def lora_target_names(self) -> tuple[str, ...]:
        return () if self.lora_targets is None else tuple(name.strip() for name in self.lora_targets.split(","))

    @property
    def rewards(self) -> dict[str, float]:
        """Name -> weight, without those of weight 0."""
        return parse_reward_weights(self.reward_weights, "--reward-weights")

    @property
    def trl_settings(self) -> dict[str, str]:
        """--trl, as text; `integrations.trl_settings` knows what each one means."""
        return {} if self.trl is None else pairs(self.trl, "--trl", "optim=sgd,adam_beta2=0.99")

    @property
    def prompt(self) -> Prompt:
        return chosen_prompt(self.model, self.prompt_suffix, self.system_prompt)

    @property
    def reading(self) -> Reading:
        return read_as(self.columns, self.image_root, self.allow_outside)

    @property
    def test_sources(self) -> tuple[str, ...]:
        return () if self.test_data is None else sources_of(self.test_data)

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks, or the one name "data"."""
        return self.tasks or ("data",)

    def recipe(self, name: str) -> str:
        """The key in RECIPES of a task, or of local data, whatever its name."""
        return recipe_name(self.model, name if self.data is None else None)

    def defaults_from(self, name: str) -> str:
        """Which recipe fills in what was not given for a task; "" if everything was."""
        given = (getattr(self, option) for option in BY_TASK)
        if all(name in value if isinstance(value, Mapping) else value is not None for value in given):
            return ""
        recipe = self.recipe(name)
        return "defaults of R1-V" if recipe == R1_V else f"defaults of {recipe} for small models"

    def for_task(self, name: str) -> TaskConfig:
        """The options that train the model of a task, or of local data (under any name)."""
        values: dict[str, Any] = {"explore_fraction": 0.0, **self.filled_in(name)}
        if self.method != "grpo-d":  # a constant weight, which is 0 for supervised fine-tuning
            beta = values.get("beta", 0.0)
            values |= {"beta_min": beta, "beta_max": beta, "kl_schedule": "constant"}
        values |= {"reward_weights": self.rewards, "loss": parse_loss(self.loss, "--loss")}
        chosen: dict[str, Any] = {field.name: values.get(field.name) for field in dataclasses.fields(TaskConfig)}
        return TaskConfig(**chosen)

    def with_steps(self, examples: Mapping[str, int]) -> TrainConfig:
        """--epochs as --max-steps, given the number of examples that each model is trained on."""
        if self.epochs is None:
            return self
        steps = {name: self._steps(name, number) for name, number in examples.items()}
        max_steps: int | Mapping[str, int] = steps if self.data is None else next(iter(steps.values()))
        return dataclasses.replace(self, epochs=None, max_steps=max_steps)

    def _steps(self, name: str, examples: int) -> int:
        assert self.epochs is not None
        batches = math.ceil(round(self.epochs * examples / self.for_task(name).prompts_per_step, 9))
        steps = max(1, batches) * self.num_iterations
        if steps > MANY:
            raise UserError(
                f"--epochs {self.epochs:g} of {examples:,} examples are {steps:,} steps, more than {MANY:,}"
            )
        return steps

    def resolved(self) -> dict[str, Any]:
        """The options of the run with every default filled in: what config.json records, and --config reads.

        An option that differs between the tasks is {task: value}; one that is not in use is left out.
        """
        by_name = {name: self.filled_in(name) for name in self.names}
        values: dict[str, Any] = {}
        for key, value in by_name[self.names[0]].items():
            each = {name: options[key] for name, options in by_name.items()}
            values[key] = each if any(other != value for other in each.values()) else value
        if self.data is None:
            values["task"] = ",".join(self.tasks)
        return {field.name: values[field.name] for field in dataclasses.fields(self) if field.name in values}

    def filled_in(self, name: str) -> dict[str, Any]:
        """The options in use for a task, with the defaults of its recipe and of the method."""
        defaults = {**RECIPES[self.recipe(name)], **KL_DEFAULTS[self.method]}
        if self.trains_adapter:
            defaults["learning_rate"] = lora_learning_rate(defaults["learning_rate"])
        if self.kl_schedule not in (None, *EXPLORING):
            defaults.pop("explore_fraction", None)
        if self.epochs is not None:
            defaults.pop("max_steps")
        values: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Mapping):
                value = value.get(name)
            values[field.name] = defaults.get(field.name) if value is None else canonical(field.name, value)
        if values["gradient_accumulation_steps"] is values["tokens_per_microbatch"] is None:
            values["gradient_accumulation_steps"] = default_pieces(self.recipe(name))
        values |= {"prompt_suffix": self.prompt.suffix, "system_prompt": self.prompt.system}
        if values["eval_batch_size"] is None:
            values["eval_batch_size"] = default_eval_batch_size(self.recipe(name) != R1_V)
        return {key: value for key, value in values.items() if value is not None}


@dataclass(frozen=True)
class TaskConfig:
    """The options with which one model is trained, every default filled in. GRPO's KL weight is a constant schedule."""

    method: str
    sft_reasoning: bool
    seed: int
    reward_weights: dict[str, float]  # without those of weight 0
    num_generations: int
    prompts_per_step: int
    max_completion_length: int
    temperature: float
    top_k: int
    top_p: float
    dynamic_sampling: bool
    mask_truncated: bool
    loss: dict[str, Any]  # keywords of the loss, beside those that the trainer sets itself
    beta_min: float
    beta_max: float
    kl_schedule: str
    explore_fraction: float
    target_kl: float | None  # of the adaptive schedule
    learning_rate: float
    warmup_steps: int
    max_steps: int  # None until `TrainConfig.with_steps` knows it
    num_iterations: int
    gradient_accumulation_steps: int | None  # None of this and the next: a prompt at a time
    tokens_per_microbatch: int | None
    gradient_checkpointing: str
    share_prefix: bool
    max_grad_norm: float
    eval_batch_size: int
    eval_sampled: int
    eval_steps: int
    save_steps: int
    save_total_limit: int

    @property
    def needs_reference(self) -> bool:
        """Whether the KL term ever has weight."""
        return self.beta_max > 0


def canonical(name: str, value: Any) -> Any:
    """An option's value in the form that is recorded: paths are absolute, so that they can be read from any folder."""
    if name == "data":
        return source_of(value)
    if name == "test_data":
        return ",".join(sources_of(value))
    if name == "image_root" or (name in ("model", "reference_model") and os.path.isdir(value)):
        return os.path.abspath(value)
    lists = ("columns", "freeze", "lora_targets", "loss", "report_to", "reward_weights", "task")
    return "".join(value.split()) if name in lists else value
