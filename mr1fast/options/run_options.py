"""What a run does beside learning: evaluations, files, what is shown where, and the device it runs on."""

from __future__ import annotations

from dataclasses import dataclass

from mr1fast.data.tasks import TASKS
from mr1fast.options.fields import LIST, MANY, PAIRS, option
from mr1fast.options.recipes import DEFAULT_EVAL_SAMPLES, default_eval_batch_size

# What --report-to knows.
ENGINES = ("mr1fast", "trl")
LOGGERS = ("tensorboard", "wandb", "trackio")


def _at_most(split: str) -> str:
    """How many problems a split has, for the tasks where that number is limited."""
    return "".join(f"; {name} has {task.splits[split]}" for name, task in TASKS.items() if task.splits[split])


@dataclass(frozen=True)
class RunOptions:
    """Evaluation, files and checkpoints, logging, device."""

    eval_samples: int | None = option(
        None,
        "largest number of test problems, of each data set, to answer before and after training; 0 turns this off"
        f"{_at_most('test')}",
        group="evaluation",
        key_of="eval",
        at_least=0,
        at_most=1_000_000,
        shown=f"{DEFAULT_EVAL_SAMPLES} of a task or of --data, all of --test-data",
    )
    eval_steps: int = option(
        50,
        "steps between evaluations on the validation split; 0 turns them off",
        group="evaluation",
        key_of="eval",
        at_least=0,
        at_most=MANY,
    )
    eval_validation_samples: int = option(
        128,
        f"number of validation problems in each of these evaluations{_at_most('validation')}",
        group="evaluation",
        key_of="eval",
        at_least=1,
        at_most=1_000_000,
    )
    eval_sampled: int = option(
        1,
        "completions to sample for each problem in all of these evaluations, besides the greedy one; 0 for none",
        group="evaluation",
        key_of="eval",
        at_least=0,
        at_most=4096,
    )
    eval_batch_size: int | None = option(
        None,
        "problems answered at once; fewer take less memory (may be changed when a run is resumed)",
        group="evaluation",
        key_of="eval",
        at_least=1,
        at_most=4096,
        why="they are held in memory together",
        shown="{} for small models, {} for others".format(*map(default_eval_batch_size, (True, False))),
        machine=True,
    )

    engine: str = option(
        "mr1fast",
        "what trains: the loop of mr1fast, or TRL's GRPOTrainer with our loss, which has vLLM, DeepSpeed and FSDP",
        group="engine",
        choices=ENGINES,
    )
    trl: str | None = option(
        None,
        "options of TRL's GRPOConfig for --engine trl, separated by commas, such as use_vllm=true; may be given "
        "several times, and as a block in a file (may be changed when a run is resumed)",
        group="engine",
        metavar=PAIRS,
        shown="none",
        several=True,
        machine=True,
    )

    output_dir: str | None = option(
        None,
        "new or empty folder for everything that the run writes",
        group="files",
        metavar="DIR",
        shown="runs/<date-time>",
    )
    save_steps: int = option(
        50,
        "steps between checkpoints; the last step always writes one",
        group="files",
        key_of="save",
        at_least=1,
        at_most=MANY,
    )
    save_total_limit: int = option(
        2,
        "number of checkpoints to keep; older ones are deleted",
        group="files",
        key_of="save",
        at_least=1,
        at_most=MANY,
    )
    save_only_model: bool = option(
        False,
        "write checkpoints without the optimizer's state, which is most of their size; training cannot be resumed from "
        "such a checkpoint",
        group="files",
        key_of="save",
        machine=True,
    )

    report_to: str = option(
        "tensorboard",
        f"where metrics and samples of the completions are shown, separated by commas: {', '.join(LOGGERS)}, or none; "
        "metrics.jsonl has the metrics in any case",
        group="logging",
        metavar=LIST,
        machine=True,
    )

    device: str = option(
        "auto",
        "device to run on: cpu, cuda, cuda:1, ...; auto is the GPU if there is one",
        group="device",
        machine=True,
    )
    dtype: str = option(
        "auto",
        "number format of the model's weights; auto is bfloat16 on a GPU and float32 on a CPU",
        group="device",
        choices=("auto", "float32", "bfloat16"),
        machine=True,
    )
    attention: str = option(
        "auto",
        "attention implementation; auto is FlashAttention 2 if it is installed, else sdpa (PyTorch's own)",
        group="device",
        choices=("auto", "sdpa", "flash_attention_2", "eager"),
        machine=True,
    )
    share_prefix: bool = option(
        True,
        "run every completion after a prompt of its own, padded; otherwise log-probabilities come from one packed row, "
        "in which a prompt with its image runs once for its completions, with PyTorch's own attention or eager",
        group="device",
        shown="no, where the model allows it",
        machine=True,
    )
    liger: str = option(
        "auto",
        "Liger's RMSNorm, rotary embedding and SwiGLU in the language model; auto uses them on a GPU where "
        "liger-kernel is installed",
        group="device",
        choices=("auto", "on", "off"),
        machine=True,
    )
    threads: int | None = option(
        None,
        "number of CPU threads to use",
        group="device",
        at_least=1,
        at_most=1024,
        shown="1 for a small model, else all CPUs",
        machine=True,
    )
