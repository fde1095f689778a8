"""A run of ours for verl: `python -m mr1fast.integrations.verl export --output DIR --config run.yaml`.

    DIR/train.parquet   the problems in verl's layout: prompt, images, reward_model.ground_truth, data_source
    DIR/test.parquet    the validation split, and what is tested on
    DIR/reward.py       compute_score, which calls our rewards with the run's weights
    DIR/run.sh          starts verl with the loss grpo_d, the KL weight's schedule, and the other options

What verl would do otherwise than our own loop is said, and what it cannot do is refused.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mr1fast.data.dataset import ImageTextDataset
from mr1fast.data.example import IMAGE_MARKER, Example
from mr1fast.errors import UserError
from mr1fast.model import load as models
from mr1fast.model.processor import Qwen2VLTextImageProcessor
from mr1fast.model.prompts import prompt_length, prompt_messages
from mr1fast.options.config import TrainConfig
from mr1fast.options.fields import option_string
from mr1fast.options.parse import parse_arguments
from mr1fast.options.program import Parser, exit_code, prog
from mr1fast.options.reward_weights import check_columns, load_rewards
from mr1fast.training.open_run import requested_config
from mr1fast.training.run_data import load_data
from mr1fast.training.run_folder import new_folder
from mr1fast.training.setup import room_for_prompts, too_long

# verl puts an image, a video or a sound in place of these.
MARKERS = (IMAGE_MARKER, "<video>", "<audio>")
ROWS_AT_A_TIME = 256  # images are held in memory meanwhile
SCHEMA = pa.schema(
    [
        ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        (
            "images",
            pa.list_(pa.struct([("bytes", pa.binary()), ("min_pixels", pa.int64()), ("max_pixels", pa.int64())])),
        ),
        ("data_source", pa.string()),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
        (
            "extra_info",
            pa.struct([("index", pa.int64()), ("split", pa.string()), ("name", pa.string()), ("columns", pa.string())]),
        ),
    ]
)
# Options of these headings of --help are about what is exported, or about our own loop alone.
_SHARED = ("data", "reward", "files", "logging", "device")
# Of the others, those that verl is told of. Any further one must be at its default.
HONOURED = {
    *("method", "model", "lora_rank", "lora_alpha", "lora_targets", "num_generations", "prompts_per_step"),
    *("max_completion_length", "temperature", "top_k", "top_p", "seed", "beta", "beta_min", "beta_max", "kl_schedule"),
    *("explore_fraction", "learning_rate", "warmup_steps", "epochs", "max_steps", "num_iterations", "max_grad_norm"),
    *("gradient_accumulation_steps", "eval_samples", "eval_steps", "eval_validation_samples", "eval_batch_size"),
}
DIFFERENCES = (
    "the learning rate falls as a cosine, and not linearly, which verl's FSDP engine does not have",
    "the KL term is verl's low_var_kl, which is ours but for cuts at 20 and 10",
    "advantages are divided by the deviation + 1e-6, and not + 1e-4",
    "prompts are shuffled by verl, and a completion without a reward counts as one with the reward 0",
)


@dataclass
class Written:
    """What was written of a split."""

    rows: int = 0
    left_out: int = 0  # with a text that verl would take for an image, a video or a sound
    longest: int = 0  # tokens of a prompt


def export(config: TrainConfig, output: Path) -> str:
    """Write all files; returns what to say. Raises UserError."""
    check_options(config)
    path = models.EMBEDDED if config.model is None else config.model
    processor = models.load_processor(path, max_pixels=config.max_pixels, prompt=config.prompt)
    check_tags(processor)
    rewards, data = load_rewards(config.rewards), load_data(config)
    name = data.names[0]
    fits = too_long(processor, room_for_prompts(config, models.load_config(path)))
    for split in data.splits:
        split.leave_out(fits)
    check_columns(rewards, data.train[name][0].reward_columns())
    config = config.with_steps({name: len(data.train[name])})
    folder = new_folder(str(output), default=output)
    train = write_parquet(folder / "train.parquet", [data.train[name]], processor)
    test = write_parquet(folder / "test.parquet", [*data.validation.values(), *data.tests.values()], processor)
    (folder / "reward.py").write_text(reward_file(config), encoding="utf-8")
    script = folder / "run.sh"
    longest = max(train.longest, test.longest)
    script.write_text(run_script(config, name, str(path), longest, tested=test.rows > 0), encoding="utf-8")
    script.chmod(0o755)
    left_out = train.left_out + test.left_out
    lines = [f"{folder}: {train.rows} problems to train on, {test.rows} to test on; start it with {script}"]
    if left_out:
        lines.append(f"left out {left_out}, whose text has one of {', '.join(MARKERS)}, which verl gives a meaning")
    return "\n".join([*lines, *(f"other than in mr1fast: {one}" for one in DIFFERENCES)])


def check_options(config: TrainConfig) -> None:
    """Raises UserError for what cannot be exported."""
    if config.method == "sft":
        raise UserError("verl is given rewards, and --method sft has none; choose grpo-d or grpo")
    if len(config.names) > 1:
        raise UserError("an export is of one model; choose a task, such as --task vc, or give --data")
    for field in dataclasses.fields(config):
        honoured = field.metadata["group"] in _SHARED or field.name in HONOURED
        if not honoured and getattr(config, field.name) != field.default:
            raise UserError(
                f"verl cannot honour {option_string(field.name)} {getattr(config, field.name)}; leave it out"
            )
    if config.kl_schedule == "adaptive":
        raise UserError("verl's workers cannot honour --kl-schedule adaptive; choose another schedule")
    _lora(config)


def check_tags(processor: Qwen2VLTextImageProcessor) -> None:
    """Raises UserError for tags that verl's reward managers, which remove special tokens, would not see."""
    for tag in ("<think>", "<answer>"):
        if tag in processor.tokenizer.all_special_tokens:
            raise UserError(
                f"{tag} is a special token of the tokenizer, and verl removes these before it asks for rewards"
            )


# ---- the problems ---------------------------------------------------------------------------------------------------


def write_parquet(file: Path, splits: Sequence[ImageTextDataset], processor: Qwen2VLTextImageProcessor) -> Written:
    """All usable problems of the splits, each once."""
    written = Written()
    with pq.ParquetWriter(file, SCHEMA) as writer:
        rows: list[dict[str, Any]] = []
        for split in splits:
            for row in _rows(split, processor, written):
                rows.append(row)
                if len(rows) == ROWS_AT_A_TIME:
                    writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
                    rows.clear()
        writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
    return written


def _rows(split: ImageTextDataset, processor: Qwen2VLTextImageProcessor, written: Written) -> Iterator[dict[str, Any]]:
    for index in range(len(split)):
        example = split.own(index)
        if example is None:
            continue
        row = row_of(example, processor, index=index, split=split.split, source=split.name)
        if row is None:
            written.left_out += 1
            continue
        written.rows += 1
        written.longest = max(written.longest, prompt_length(processor, example))
        yield row


def row_of(
    example: Example, processor: Qwen2VLTextImageProcessor, *, index: int, split: str, source: str
) -> dict[str, Any] | None:
    """A row of SCHEMA; None where verl would take a text for an image, a video or a sound."""
    images = example.images
    prompt = []
    for message in prompt_messages(processor.prompt, example.problem, len(images)):
        texts = [part["text"] if part["type"] == "text" else None for part in message["content"]]
        if images and any(marker in text for text in texts if text for marker in MARKERS):
            return None
        content = "".join(IMAGE_MARKER if text is None else text for text in texts)
        prompt.append({"role": message["role"], "content": content})
    size = processor.image_processor.size
    bounds = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    columns = json.dumps(example.reward_columns(), default=str)
    return {
        "prompt": prompt,
        "images": [{"bytes": _png(image), **bounds} for image in images],
        "data_source": source,
        "ability": "visual reasoning",
        "reward_model": {"style": "rule", "ground_truth": example.solution},
        "extra_info": {"index": index, "split": split, "name": example.name, "columns": columns},
    }


def _png(image: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


# ---- the reward -----------------------------------------------------------------------------------------------------


def reward_file(config: TrainConfig) -> str:
    return f'''"""The rewards of the run, for verl's reward.custom_reward_function. Written by mr1fast."""

from mr1fast.integrations.verl_reward import scorer

compute_score = scorer({config.rewards!r})
'''


# ---- the script -----------------------------------------------------------------------------------------------------


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
        **_lora(config),
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


def _lora(config: TrainConfig) -> dict[str, Any]:
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


# ---- the program ----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    return exit_code(_main, argv)


def _main(argv: Sequence[str] | None) -> None:
    parser = Parser(prog=prog("integrations.verl"), description="A run of mr1fast for verl.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    writes = commands.add_parser(
        "export",
        help="write problems, rewards and a script that starts verl",
        description="Write problems, rewards and a script that starts verl. All options of python -m mr1fast.train "
        "may follow, such as --config run.yaml.",
    )
    writes.add_argument("--output", required=True, metavar="DIR", help="new or empty folder for the files")
    checks = commands.add_parser("check", help="read an export with verl's own classes, where verl is installed")
    checks.add_argument("folder", metavar="DIR", help="a folder that export has written")
    known, rest = parser.parse_known_args(argv)
    if known.command == "check":
        from mr1fast.integrations.verl_check import check

        if rest:
            raise UserError(f"unknown argument {rest[0]}")
        print(check(Path(known.folder)))
        return
    request = parse_arguments(rest)
    if request.config is None:
        raise UserError("--resume is for a run of our own, and an export is not one; leave it out")
    print(export(requested_config(request), Path(known.output)))
