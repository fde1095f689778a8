"""From our options to TRL's: the GRPODConfig of `--engine trl`, and what `--trl` may set in it."""

from __future__ import annotations

import dataclasses
import types
import typing
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import yaml

from mr1fast.checks import described, nearest
from mr1fast.errors import UserError
from mr1fast.integrations.trl import GRPODConfig
from mr1fast.model.load import choose_device
from mr1fast.options.config import TaskConfig, TrainConfig
from mr1fast.options.config_file import safely_loaded
from mr1fast.options.fields import MANY, option_string

# Options of these headings of --help have nothing to do with the engine.
_SHARED = ("data", "reward", "evaluation", "engine", "files", "logging")
# Of the others, those that mean the same with this engine. Any further one must be at its default.
HONOURED = {
    *("method", "model", "freeze", "lora_rank", "lora_alpha", "lora_targets", "merge"),
    *("num_generations", "prompts_per_step", "max_completion_length", "temperature", "top_k", "top_p", "seed"),
    *("loss", "beta", "beta_min", "beta_max", "kl_schedule", "explore_fraction"),
    *("learning_rate", "warmup_steps", "epochs", "max_steps", "num_iterations", "gradient_accumulation_steps"),
    *("max_grad_norm", "device", "dtype", "attention", "liger", "threads"),
}
# Keywords of --loss that TRL has, and what it calls them; and those of which it does not have every value.
LOSS = {
    "loss_type": "loss_type",
    "importance_sampling_level": "importance_sampling_level",
    "delta": "delta",
    "epsilon_low": "epsilon",
    "epsilon_high": "epsilon_high",
    "scale_rewards": "scale_rewards",
    "use_bias_correction_kl": "use_bias_correction_kl",
    "entropy_coef": "entropy_coef",
    "sapo_temperature_pos": "sapo_temperature_pos",
    "sapo_temperature_neg": "sapo_temperature_neg",
    "top_entropy_quantile": "top_entropy_quantile",
    "off_policy_mask_threshold": "off_policy_mask_threshold",
}
LOSS_VALUES = {
    "loss_type": ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo"),
    "importance_sampling_level": ("token", "sequence"),
}
# What of GRPODConfig an option of ours sets. None: this engine sets it, and nothing else will do.
OURS: Mapping[str, str | None] = {
    "beta": "beta",
    "beta_max": "beta_max",
    "beta_min": "beta_min",
    "bf16": "dtype",
    "explore_fraction": "explore_fraction",
    "fp16": "dtype",
    "generation_batch_size": "prompts_per_step",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "kl_schedule": "kl_schedule",
    "learning_rate": "learning_rate",
    "max_completion_length": "max_completion_length",
    "max_grad_norm": "max_grad_norm",
    "max_steps": "max_steps",
    "num_generations": "num_generations",
    "num_iterations": "num_iterations",
    "num_train_epochs": "epochs",
    "output_dir": "output_dir",
    "per_device_train_batch_size": "prompts_per_step",
    "report_to": "report_to",
    "resume_from_checkpoint": "resume",
    "reward_weights": "reward_weights",
    "save_only_model": "save_only_model",
    "save_steps": "save_steps",
    "save_total_limit": "save_total_limit",
    "seed": "seed",
    "steps_per_generation": "gradient_accumulation_steps",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "use_cpu": "device",
    "warmup_steps": "warmup_steps",
    **dict.fromkeys(LOSS.values(), "loss"),
    **dict.fromkeys(
        [
            *(
                "auto_find_batch_size",
                "data_seed",
                "disable_tqdm",
                "do_eval",
                "do_train",
                "eval_on_start",
                "eval_steps",
            ),
            *("eval_strategy", "ignore_data_skip", "logging_first_step", "logging_nan_inf_filter", "logging_steps"),
            *("logging_strategy", "lr_scheduler_kwargs", "lr_scheduler_type", "model_init_kwargs"),
            *("num_generations_eval", "per_device_eval_batch_size", "remove_unused_columns", "save_strategy"),
            "shuffle_dataset",
        ]
    ),
}


def check_options(config: TrainConfig) -> None:
    """Raises UserError for an option that this engine cannot honour, and for a mistake in --trl."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        honoured = field.metadata["group"] in _SHARED or field.name in HONOURED
        if not honoured and value != field.default:
            raise UserError(f"--engine trl cannot honour {option_string(field.name)} {value}; leave one of them out")
    if config.kl_schedule == "adaptive":
        raise UserError("--engine trl cannot honour --kl-schedule adaptive; choose another schedule")
    if ":" in config.device:
        number = config.device.partition(":")[2]
        raise UserError(f"--engine trl takes the devices that it is shown: set CUDA_VISIBLE_DEVICES={number} instead")
    values = converted(config.trl_settings)
    for name in config.names:
        task = config.for_task(name)
        if task.max_steps is not None:  # else --epochs says it once the data is known
            settings(task, values, output_dir="unused", device=choose_device(config.device))


def settings(
    task: TaskConfig,
    values: Mapping[str, Any],
    *,
    output_dir: str,
    device: torch.device,
    processes: int = 1,
    bf16: bool = False,
    small: bool = False,
) -> GRPODConfig:
    """TRL's configuration of one model's training. Raises UserError for what TRL does not take.

    values: those of `converted`. processes: among which each batch is divided. bf16: compute in that; the weights are
    float32 in any case, as behind our own optimizer. small: the model is, and needs no gradient checkpointing.
    """
    ours = _of_task(task) | {
        "output_dir": output_dir,
        "use_cpu": device.type == "cpu",
        "bf16": bf16,
        "gradient_checkpointing": not small,
    }
    ours["per_device_train_batch_size"] //= processes
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of what TRL will name otherwise
            return GRPODConfig(**(ours | dict(values)))
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise UserError(f"--engine trl: {' '.join(str(error).split())}") from error


def _of_task(task: TaskConfig) -> dict[str, Any]:
    completions = task.prompts_per_step * task.num_generations
    pieces = task.gradient_accumulation_steps or task.prompts_per_step  # a prompt at a time
    schedule = {"kl_schedule": task.kl_schedule, "beta_min": task.beta_min, "beta_max": task.beta_max}
    if task.kl_schedule == "paper":
        schedule["explore_fraction"] = task.explore_fraction
    return {
        **(schedule if task.needs_reference else {"beta": 0.0}),
        "per_device_train_batch_size": completions // pieces,
        "gradient_accumulation_steps": pieces,
        "num_generations": task.num_generations,
        "num_iterations": task.num_iterations,
        "max_completion_length": task.max_completion_length,
        "temperature": task.temperature,
        "top_k": task.top_k,
        "top_p": task.top_p,
        "learning_rate": task.learning_rate,
        "max_steps": task.max_steps,
        "max_grad_norm": task.max_grad_norm,
        "seed": task.seed,
        "reward_weights": list(task.reward_weights.values()),
        "use_bias_correction_kl": False,
        **_loss(task.loss),
        "disable_dropout": True,
        "weight_decay": 0.0,
        "shuffle_dataset": False,  # the rows are in training's order
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": MANY,  # `trl_engine.Record` says when
        "report_to": "none",
        "disable_tqdm": True,
    }


def _loss(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Those of --loss by TRL's names. Raises UserError for what its loss does not have."""
    for name, value in keywords.items():
        if name not in LOSS or value not in LOSS_VALUES.get(name, (value,)):
            raise UserError(f"--engine trl cannot honour --loss {name}={value}; leave one of them out")
    return {LOSS[name]: value for name, value in keywords.items()}


# ---- --trl ----------------------------------------------------------------------------------------------------------


def converted(given: Mapping[str, str]) -> dict[str, Any]:
    """The options of --trl in the types of GRPODConfig. Raises UserError for one that it does not have, or we set."""
    hints = typing.get_type_hints(GRPODConfig)
    known = {field.name for field in dataclasses.fields(GRPODConfig) if field.init}
    values = {}
    for name, text in given.items():
        if name not in known:
            free = sorted(known - set(OURS))
            raise UserError(f"--trl: GRPOConfig has no option {name!r}{nearest(name, free)}")
        if name in OURS:
            option = OURS[name]
            instead = f"give {option_string(option)} instead" if option else "leave it out"
            raise UserError(f"--trl {name}: that is set by mr1fast, whichever engine trains; {instead}")
        values[name] = _converted(f"--trl {name}", text, hints[name])
    return values


def _converted(source: str, text: str, hint: Any) -> Any:
    """The value that YAML makes of the text, if the hint allows for it, or the text itself."""
    allowed = _types(hint)
    try:
        value = safely_loaded(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        value = text
    if float in allowed and not isinstance(value, bool):
        try:
            return float(text)  # YAML takes 1e-6 for text
        except ValueError:
            pass
    if type(value) in allowed:
        return value
    if str in allowed and (not isinstance(value, bool) or bool not in allowed):
        return text
    wanted = " or ".join(_WORDS.get(kind, kind.__name__) for kind in allowed if kind is not types.NoneType)
    raise UserError(f"{source} must be {wanted}, got {described(text)}")


_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a mapping",
    list: "a list",
}


def _types(hint: Any) -> list[type]:
    """The plain types of a hint such as `dict[str, Any] | str | None`."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [kind for part in typing.get_args(hint) for kind in _types(part)]
    plain = typing.get_origin(hint) or hint
    return [plain] if isinstance(plain, type) else [str]
