"""Which options contradict each other, or need each other."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from mr1fast.errors import UserError
from mr1fast.losses.kl_weight import EXPLORING
from mr1fast.options.fields import check_choice, option_string
from mr1fast.options.loss_keywords import DEFAULT_LOSS, try_loss
from mr1fast.options.problem_options import PARTS
from mr1fast.options.reading import check_no_reading
from mr1fast.options.recipes import KL_DEFAULTS, TASK_NAMES
from mr1fast.options.run_options import LOGGERS
from mr1fast.options.train_options import BY_TASK

if TYPE_CHECKING:
    from mr1fast.options.config import TrainConfig


def check_together(config: TrainConfig) -> None:
    """Raises UserError, in one sentence."""
    _check_tasks(config)
    _check_data(config)
    _check_kl(config)
    _check_parts(config)
    _check_loggers(config)
    _check_engine(config)
    _check_steps(config)
    _check_loss(config)


def _check_data(config: TrainConfig) -> None:
    if (config.data, config.test_data) == (None, None):
        check_no_reading(config.columns, config.image_root, config.allow_outside)
    _ = config.reading  # raises for what is not KEY=VALUE
    if len(set(config.test_sources)) < len(config.test_sources):
        raise UserError(f"--test-data {config.test_data} names the same data twice")
    if config.epochs is not None and config.max_steps is not None:
        raise UserError("--epochs and --max-steps exclude each other; give one")
    if config.epochs is not None and config.data is None and config.train_samples is None:
        raise UserError("--epochs needs --data or --train-samples: the drawings of a task never end")


def _check_tasks(config: TrainConfig) -> None:
    if config.data is not None and config.task is not None:
        raise UserError(f"--task {config.task} and --data {config.data} exclude each other; give one")
    for name in config.tasks:
        check_choice("--task", name, TASK_NAMES)
    if len(set(config.tasks)) < len(config.tasks):
        raise UserError(f"--task {config.task} names a task twice")
    for name in BY_TASK:
        value = getattr(config, name)
        if isinstance(value, Mapping):
            if config.data is not None:
                raise UserError(f"{option_string(name)} must be one value with --data, got {value}")
            for task in value:
                check_choice(f"{option_string(name)}: a task", task, TASK_NAMES)


def _check_loggers(config: TrainConfig) -> None:
    for name in config.loggers:
        check_choice("--report-to: a logger", name, (*LOGGERS, "none"))
    if len(set(config.loggers)) < len(config.loggers):
        raise UserError(f"--report-to {config.report_to} names a logger twice")
    if "none" in config.loggers:
        raise UserError(f"--report-to {config.report_to}: none is given with something else")


def _check_engine(config: TrainConfig) -> None:
    if config.trl is not None and config.engine != "trl":
        raise UserError(f"--trl belongs to --engine trl, and the engine is {config.engine}")
    if config.engine == "trl" and config.method == "sft":
        raise UserError("--engine trl trains with rewards, and --method sft has none; leave out --engine trl")
    _ = config.trl_settings  # raises for what is not KEY=VALUE


def _check_kl(config: TrainConfig) -> None:
    for method, names in KL_DEFAULTS.items():
        for name in names:
            if method != config.method and getattr(config, name) is not None:
                raise UserError(
                    f"{option_string(name)} belongs to --method {method}, and the method is {config.method}"
                )
    if config.explore_fraction is not None and config.kl_schedule not in (None, *EXPLORING):
        raise UserError(
            f"--explore-fraction belongs to --kl-schedule {' or '.join(EXPLORING)}, "
            f"and the schedule is {config.kl_schedule}"
        )
    if (config.target_kl is not None) != (config.kl_schedule == "adaptive"):
        raise UserError("--target-kl and --kl-schedule adaptive go together; one was given without the other")
    if config.method == "grpo-d":
        low, high = (config.filled_in(config.names[0])[name] for name in ("beta_min", "beta_max"))
        if low > high:
            raise UserError(f"--beta-min must not be above --beta-max, got {low} and {high}")
    if config.reference_model is not None and not config.for_task(config.names[0]).needs_reference:
        raise UserError("--reference-model is of no use: the KL weight is 0 throughout; leave it out")


def _check_parts(config: TrainConfig) -> None:
    for part in config.frozen_parts:
        check_choice("--freeze: a part", part, PARTS)
    if set(config.frozen_parts) == set(PARTS):
        raise UserError(f"--freeze {config.freeze} leaves nothing to train")
    if config.lora_rank is None and (config.lora_alpha, config.lora_targets) != (None, None):
        raise UserError("--lora-alpha and --lora-targets need --lora-rank, which is not given")
    if config.merge and not config.trains_adapter and (config.model is None or os.path.isdir(config.model)):
        raise UserError("--merge needs --lora-rank, or the folder of an adapter as --model")


def _check_steps(config: TrainConfig) -> None:
    sampling = {
        "--num-iterations above 1": config.num_iterations > 1,
        "--dynamic-sampling": config.dynamic_sampling,
        "--mask-truncated": config.mask_truncated,
    }
    for option, given in sampling.items():
        if given and config.method == "sft":
            raise UserError(f"{option} needs sampled completions, and --method sft samples none")
    if config.sft_reasoning and config.method != "sft":
        raise UserError(f"--sft-reasoning belongs to --method sft, and the method is {config.method}")
    for name in config.names:
        task = config.for_task(name)
        pieces, tokens = task.gradient_accumulation_steps, task.tokens_per_microbatch
        if pieces is not None and tokens is not None:
            raise UserError(
                f"--gradient-accumulation-steps {pieces} and --tokens-per-microbatch {tokens} both divide a step into "
                "pieces; give one"
            )
        if pieces is not None and task.prompts_per_step % pieces:
            raise UserError(
                f"--gradient-accumulation-steps must divide --prompts-per-step, got {pieces} and "
                f"{task.prompts_per_step}"
            )


def _check_loss(config: TrainConfig) -> None:
    if config.loss == DEFAULT_LOSS:
        return
    if config.method == "sft":
        raise UserError("--loss is that of GRPO, and the method is sft")
    task = config.for_task(config.names[0])
    try_loss(task.loss, with_kl=task.needs_reference, off_policy=task.num_iterations > 1)
