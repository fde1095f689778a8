"""A run of ours for verl: `python -m mr1fast.integrations.verl export --output DIR --config run.yaml`.

    DIR/train.parquet   the problems in verl's layout: prompt, images, reward_model.ground_truth, data_source
    DIR/test.parquet    the validation split, and what is tested on
    DIR/reward.py       compute_score, which calls our rewards with the run's weights
    DIR/run.sh          starts verl with the loss grpo_d, the KL weight's schedule, and the other options

What verl would do otherwise than our own loop is said, and what it cannot do is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from mr1fast.errors import UserError
from mr1fast.integrations.verl_problems import MARKERS, write_parquet
from mr1fast.integrations.verl_script import lora_options, run_script
from mr1fast.model import load as models
from mr1fast.model.processor import Qwen2VLTextImageProcessor
from mr1fast.options.config import TrainConfig
from mr1fast.options.fields import option_string
from mr1fast.options.parse import parse_arguments
from mr1fast.options.program import Parser, exit_code, prog
from mr1fast.options.reward_weights import check_columns, load_rewards
from mr1fast.training.open_run import requested_config
from mr1fast.training.run_data import load_data
from mr1fast.training.run_folder import new_folder
from mr1fast.training.setup import room_for_prompts, too_long

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
    lora_options(config)  # names what is missing


def check_tags(processor: Qwen2VLTextImageProcessor) -> None:
    """Raises UserError for tags that verl's reward managers, which remove special tokens, would not see."""
    for tag in ("<think>", "<answer>"):
        if tag in processor.tokenizer.all_special_tokens:
            raise UserError(
                f"{tag} is a special token of the tokenizer, and verl removes these before it asks for rewards"
            )


def reward_file(config: TrainConfig) -> str:
    return f'''"""The rewards of the run, for verl's reward.custom_reward_function. Written by mr1fast."""

from mr1fast.integrations.verl_reward import scorer

compute_score = scorer({config.rewards!r})
'''


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
