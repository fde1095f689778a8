"""The script that starts verl on an export: its loss grpo_d, the KL weight's schedule, and the run's other options."""

from __future__ import annotations

import math
import os
import shlex
from typing import Any

from mr1fast.errors import UserError
from mr1fast.options.config import TrainConfig


def run_script(config: TrainConfig, name: str, model: str, longest: int, *, tested: bool) -> str:
    """run.sh. longest: tokens of the longest prompt."""
    told = options(config, name, model, longest)
    lines = [f"    {key}={_value(value)} \\" for key, value in told.items()]
    files = ["train", "test" if tested else "train"]
    own = f'export PYTHONPATH={shlex.quote(os.getcwd())}:"${{PYTHONPATH:-}}"\n' if is_own(config) else ""
    return f"""#!/bin/bash
# {config.method} on {name} through verl 0.9.1. Written by mr1fast; not tried on GPUs.
# Arguments are further options of verl, and take precedence: ./run.sh trainer.n_gpus_per_node=4
set -euo pipefail
here="$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)"
export VERL_USE_EXTERNAL_MODULES=mr1fast.integrations.verl
{own}python -m verl.trainer.main_ppo \\
    data.train_files="$here/{files[0]}.parquet" \\
    data.val_files="$here/{files[1]}.parquet" \\
    reward.custom_reward_function.path="$here/reward.py" \\
    trainer.default_local_dir="$here/checkpoints" \\
{chr(10).join(lines)}
    "$@"
"""


def is_own(config: TrainConfig) -> bool:
    """Whether there is a reward function of the user's, which is looked for in the current folder."""
    return any(":" in name for name in config.rewards)


def _value(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, list):
        return shlex.quote(f"[{','.join(map(str, value))}]")
    return shlex.quote(str(value))


def options(config: TrainConfig, name: str, model: str, longest: int) -> dict[str, Any]:
    """What verl is told beside the files, by its own names."""
    task = config.for_task(name)
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    steps = math.ceil(task.max_steps / task.num_iterations)  # verl counts batches, each used ppo_epochs times
    loggers = ["console", *config.loggers]
    return {
        "algorithm.adv_estimator": "grpo",
        "algorithm.use_kl_in_reward": False,
        "data.train_batch_size": task.prompts_per_step,
        "data.max_prompt_length": longest,
        "data.max_response_length": task.max_completion_length,
        "data.seed": task.seed,
        "data.truncation": "error",
        "actor_rollout_ref.model.path": model,
        **lora_options(config),
        f"{actor}.optim.lr": task.learning_rate,
        f"{actor}.optim.lr_warmup_steps": min(task.warmup_steps, steps),
        f"{actor}.optim.lr_scheduler_type": "cosine",
        f"{actor}.optim.weight_decay": 0.0,
        f"{actor}.optim.clip_grad": task.max_grad_norm,
        f"{actor}.grad_clip": task.max_grad_norm,
        f"{actor}.ppo_mini_batch_size": task.prompts_per_step,
        f"{actor}.ppo_epochs": task.num_iterations,
        f"{actor}.use_dynamic_bsz": True,
        f"{actor}.ppo_max_token_len_per_gpu": max(16384, longest + task.max_completion_length),
        f"{actor}.clip_ratio": 0.2,
        f"{actor}.clip_ratio_c": None,
        f"{actor}.loss_agg_mode": "seq-mean-token-mean",
        f"{actor}.entropy_coeff": 0,
        **_kl(actor, task),
        f"{rollout}.name": "vllm",
        f"{rollout}.n": task.num_generations,
        f"{rollout}.temperature": task.temperature,
        f"{rollout}.top_k": task.top_k or -1,
        f"{rollout}.top_p": task.top_p,
        f"{rollout}.tensor_model_parallel_size": 1,
        "trainer.total_training_steps": steps,
        "trainer.total_epochs": steps,
        "trainer.save_freq": task.save_steps,
        "trainer.max_actor_ckpt_to_keep": task.save_total_limit,
        "trainer.test_freq": task.eval_steps or -1,
        "trainer.project_name": "mr1fast",
        "trainer.experiment_name": f"{config.method}-{name}",
        "trainer.logger": loggers,
        "trainer.n_gpus_per_node": 8,
        "trainer.nnodes": 1,
    }


def _kl(actor: str, task: Any) -> dict[str, Any]:
    loss = f"{actor}.policy_loss"
    made = {f"{loss}.loss_mode": "grpo_d", f"{actor}.use_kl_loss": task.needs_reference}
    if not task.needs_reference:
        return made
    schedule = {"kl_schedule": task.kl_schedule, "beta_min": task.beta_min, "beta_max": task.beta_max}
    if task.kl_schedule == "paper":
        schedule["explore_fraction"] = task.explore_fraction
    return {
        **made,
        f"{loss}._target_": "mr1fast.integrations.verl.PolicyLossConfig",
        **{f"+{loss}.{name}": value for name, value in schedule.items()},
        f"{actor}.kl_loss_type": "low_var_kl",
        f"{actor}.kl_loss_coef": task.beta_max,
    }


def lora_options(config: TrainConfig) -> dict[str, Any]:
    if config.lora_rank is None:
        return {}
    if not config.lora_target_names:
        raise UserError("verl takes the layers of an adapter by name: give --lora-targets, such as q_proj,v_proj")
    alpha = 2 * config.lora_rank if config.lora_alpha is None else config.lora_alpha
    model = "actor_rollout_ref.model"
    return {
        f"{model}.lora_rank": config.lora_rank,
        f"{model}.lora_alpha": alpha,
        f"{model}.target_modules": list(config.lora_target_names),
    }
