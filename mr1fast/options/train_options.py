"""The trainer's options, one by one: name, type, default, bounds, and what --help says of them.

What they mean together is in `config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mr1fast.data.tasks import TASKS
from mr1fast.losses.kl_weight import ALL_SCHEDULES, EXPLORING
from mr1fast.options.fields import MANY, option
from mr1fast.options.recipes import KL_DEFAULTS, R1_V, RECIPES, TASK_NAMES
from mr1fast.options.reward_weights import DEFAULT_REWARDS

METHODS = tuple(KL_DEFAULTS)
# The options that may differ by task, since recipes do: a value for all tasks, or {task: value}.
BY_TASK = (*RECIPES[R1_V], "gradient_accumulation_steps")
BETA_WHY = "rewards are of the order of 1, and the rest of the loss would drown in the KL term"
# What --freeze knows; `Policy.freeze_parts` says which weights they are.
PARTS = ("vision", "merger", "language")
# The headings of --help, in this order.
GROUPS = {
    "model": "model and method",
    "data": "data",
    "reward": "rewards",
    "sampling": "sampling",
    "kl": "KL term of the loss",
    "optimizer": "optimizer",
    "evaluation": "evaluation",
    "files": "files and checkpoints",
    "device": "device (a resumed run may have other values)",
}


def _by_recipe(name: str) -> str:
    first, *others = TASK_NAMES
    small, large = str(RECIPES[first][name]), str(RECIPES[R1_V][name])
    values = {task: str(RECIPES[task][name]) for task in others}
    differ = ", ".join(f"{task}: {value}" for task, value in values.items() if value != small)
    if not differ and small == large:
        return small
    small = f"{small} ({differ})" if differ else small
    return f"{small} for small models, {large} for others"


def _at_most(split: str) -> str:
    """What a split has, of the tasks in which it has an end."""
    return "".join(f"; {name} has {task.splits[split]}" for name, task in TASKS.items() if task.splits[split])


def _of_method(name: str) -> str:
    method = next(method for method, values in KL_DEFAULTS.items() if name in values)
    return f"{KL_DEFAULTS[method][name]}; --method {method} only"


@dataclass(frozen=True)
class TrainOptions:
    """Every option of `python -m mr1fast.train`, with its help; None where the default depends on others."""

    method: str = option(
        "grpo-d",
        "GRPO-D, whose KL weight changes during training; GRPO, with a constant one; or supervised fine-tuning",
        group="model",
        choices=METHODS,
    )
    model: str | None = option(
        None,
        "the Qwen2-VL to start from: a folder, or a name on the Hugging Face hub",
        group="model",
        metavar="DIR",
        shown="the embedded model",
    )
    freeze: str | None = option(
        None,
        "parts that are not trained, separated by commas: vision (the vision tower), merger (its last layers, which "
        "make image tokens), language (the language model)",
        group="model",
        metavar="LIST",
        shown="none",
    )
    lora_rank: int | None = option(
        None,
        "train LoRA adapters of this rank in place of the weights; a --learning-rate from 1e-5 to 2e-4 is usual then",
        group="model",
        at_least=1,
        at_most=4096,
        shown="none: every weight is trained",
    )
    lora_alpha: float | None = option(
        None,
        "the adapters count --lora-alpha / --lora-rank times",
        group="model",
        at_least=1e-3,
        at_most=1e6,
        shown="2 x --lora-rank",
    )
    lora_targets: str | None = option(
        None,
        "linear layers that get an adapter, such as q_proj,v_proj",
        group="model",
        metavar="LIST",
        shown="all of the language model",
    )
    merge: bool = option(
        False,
        "with LoRA, save model/ as a whole model, which has the adapter in its weights, and the adapter as adapter/",
        group="model",
    )
    task: str | None = option(
        None,
        f"an embedded task, {' or '.join(f'{name} ({task.title})' for name, task in TASKS.items())}, or "
        f"{','.join(TASKS)}: a model for each, one after the other",
        group="data",
        metavar="NAME",
        shown=f"{','.join(TASKS)}, or none with --data",
    )
    data: str | None = option(
        None,
        "your own data in place of a task: a folder, or a .jsonl, .json, .csv or .parquet file, with the columns "
        "image, problem and solution",
        group="data",
        metavar="PATH",
        shown="none",
    )
    max_pixels: int | None = option(
        None,
        "scale larger images down to this many pixels",
        group="data",
        at_least=1,
        at_most=MANY,
        shown="as the model's processor says",
    )
    max_prompt_length: int | None = option(
        None,
        "leave out problems whose prompt, image included, is longer than this",
        group="data",
        unit="tokens",
        at_least=1,
        at_most=1_000_000,
        shown="what the model takes, less --max-completion-length",
    )
    reward_weights: str = option(
        DEFAULT_REWARDS,
        "what is rewarded: name=weight, separated by commas; names are accuracy (is the answer right?), format (are "
        "the tags right?), and module:function, a Python function of your own, (completion, solution) -> number",
        group="reward",
        metavar="LIST",
    )
    num_generations: int = option(
        8, "completions sampled for each prompt: the group of GRPO", group="sampling", at_least=2, at_most=4096
    )
    prompts_per_step: int | Mapping[str, int] | None = option(
        None,
        "prompts in each batch",
        group="sampling",
        at_least=1,
        at_most=4096,
        why="they are held in memory together",
        shown=_by_recipe("prompts_per_step"),
    )
    max_completion_length: int | Mapping[str, int] | None = option(
        None,
        "longest completion; sampling stops there",
        group="sampling",
        unit="tokens",
        at_least=1,
        at_most=1_000_000,
        why="no Qwen2-VL takes as many tokens",
        shown=_by_recipe("max_completion_length"),
    )
    temperature: float = option(
        1.0,
        "sampling temperature, also of the log-probabilities in the loss",
        group="sampling",
        at_least=0.01,
        at_most=100.0,
        why="logits are divided by it",
    )
    seed: int = option(0, "seed for shuffling the prompts and for sampling", group="sampling", at_least=0)

    beta: float | None = option(
        None, "the KL weight", group="kl", at_least=0, at_most=1000, why=BETA_WHY, shown=_of_method("beta")
    )
    beta_min: float | None = option(
        None, "lowest KL weight", group="kl", at_least=0, at_most=1000, why=BETA_WHY, shown=_of_method("beta_min")
    )
    beta_max: float | None = option(
        None, "highest KL weight", group="kl", at_least=0, at_most=1000, why=BETA_WHY, shown=_of_method("beta_max")
    )
    kl_schedule: str | None = option(
        None,
        "how the KL weight moves between the two: paper is Eq. 3, constant stays at --beta-max",
        group="kl",
        choices=ALL_SCHEDULES,
        shown=_of_method("kl_schedule"),
    )
    explore_fraction: float | None = option(
        None,
        "fraction of the steps in which Eq. 3 explores, that is, lowers the KL weight",
        group="kl",
        at_least=0,
        below=1,
        shown=f"{KL_DEFAULTS['grpo-d']['explore_fraction']}; --kl-schedule {' and '.join(EXPLORING)} only",
    )
    target_kl: float | None = option(
        None,
        "the KL divergence from the base model that the adaptive schedule aims at",
        group="kl",
        unit="nats per token",
        at_least=1e-6,
        at_most=1000,
        why="less is lost in rounding, and more is not reached",
        shown="none; --kl-schedule adaptive needs it, and no other takes it",
    )

    learning_rate: float | Mapping[str, float] | None = option(
        None,
        "highest learning rate of AdamW, reached after --warmup-steps",
        group="optimizer",
        at_least=1e-12,
        at_most=1.0,
        why="AdamW moves each weight by about that much in a step",
        shown=_by_recipe("learning_rate"),
    )
    warmup_steps: int = option(
        10, "optimizer steps over which the learning rate rises", group="optimizer", at_least=0, at_most=MANY
    )
    max_steps: int | Mapping[str, int] | None = option(
        None,
        "optimizer steps in all; the learning rate falls to 0 over them",
        group="optimizer",
        at_least=1,
        at_most=MANY,
        shown=_by_recipe("max_steps"),
    )
    num_iterations: int = option(
        1, "optimizer steps on each batch of completions", group="optimizer", at_least=1, at_most=MANY
    )
    gradient_accumulation_steps: int | Mapping[str, int] | None = option(
        None,
        "pieces in which a batch goes through the model, to save memory; the gradient is the same",
        group="optimizer",
        at_least=1,
        shown="1 for small models, --prompts-per-step for others, which is one prompt at a time",
    )
    max_grad_norm: float = option(
        1.0,
        "gradients of a larger norm are scaled down to it",
        group="optimizer",
        at_least=1e-6,
        why="AdamW takes gradients far below 1e-8 for 0",
    )

    eval_samples: int = option(
        400,
        f"problems of the test split, answered before and after training{_at_most('test')}",
        group="evaluation",
        at_least=1,
        at_most=1_000_000,
    )
    eval_steps: int = option(
        50,
        "steps between evaluations on the validation split; 0 for none",
        group="evaluation",
        at_least=0,
        at_most=MANY,
    )
    eval_validation_samples: int = option(
        128,
        f"problems of the validation split in each of these evaluations{_at_most('validation')}",
        group="evaluation",
        at_least=1,
        at_most=1_000_000,
    )

    output_dir: str | None = option(
        None, "folder for all that the run writes, new or empty", group="files", metavar="DIR", shown="runs/<date-time>"
    )
    save_steps: int = option(
        50,
        "steps between checkpoints; the last step always makes one",
        group="files",
        at_least=1,
        at_most=MANY,
    )
    save_total_limit: int = option(
        2, "how many checkpoints are kept; the oldest are deleted", group="files", at_least=1, at_most=MANY
    )

    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto is a GPU if there is one", group="device", machine=True)
    dtype: str = option(
        "auto",
        "auto is bfloat16 on a GPU and float32 on a CPU",
        group="device",
        choices=("auto", "float32", "bfloat16"),
        machine=True,
    )
    attention: str = option(
        "auto",
        "auto is FlashAttention 2 where it is installed, else sdpa",
        group="device",
        choices=("auto", "sdpa", "flash_attention_2", "eager"),
        machine=True,
    )
    threads: int | None = option(
        None,
        "CPU threads",
        group="device",
        at_least=1,
        at_most=1024,
        shown="1 for a small model, else all CPUs",
        machine=True,
    )
