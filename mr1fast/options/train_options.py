"""The trainer's options, one by one: name, type, default, bounds, and what --help says about them.

`config` says what they mean together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mr1fast.data.columns import EXAMPLE
from mr1fast.data.tasks import TASKS
from mr1fast.losses.kl_weight import ALL_SCHEDULES, EXPLORING
from mr1fast.options.fields import MANY, option
from mr1fast.options.recipes import (
    DEFAULT_EVAL_SAMPLES,
    KL_DEFAULTS,
    R1_V,
    RECIPES,
    TASK_NAMES,
    default_eval_batch_size,
)
from mr1fast.options.reward_weights import DEFAULT_REWARDS
from mr1fast.rewards.own import FORM

METHODS = tuple(KL_DEFAULTS)
ENGINES = ("mr1fast", "trl")
# The options that may differ by task, since recipes differ by task: one value for all tasks, or {task: value}.
BY_TASK = (*RECIPES[R1_V], "gradient_accumulation_steps")
BETA_WHY = "rewards are of the order of 1, so the KL term would drown out the rest of the loss"
# What --freeze knows; `Policy.freeze_parts` says which weights they are.
PARTS = ("vision", "merger", "language")
# What --report-to knows.
LOGGERS = ("tensorboard", "wandb", "trackio")
# The headings of --help, in this order.
GROUPS = {
    "model": "model and method",
    "data": "data",
    "reward": "rewards",
    "sampling": "sampling",
    "kl": "KL term of the loss",
    "optimizer": "optimizer",
    "evaluation": "evaluation",
    "engine": "engine",
    "files": "files and checkpoints",
    "logging": "logging (may be changed when a run is resumed)",
    "device": "device (may be changed when a run is resumed)",
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
    """How many problems a split has, for the tasks where that number is limited."""
    return "".join(f"; {name} has {task.splits[split]}" for name, task in TASKS.items() if task.splits[split])


def _of_method(name: str) -> str:
    method = next(method for method, values in KL_DEFAULTS.items() if name in values)
    return f"{KL_DEFAULTS[method][name]}; --method {method} only"


@dataclass(frozen=True)
class TrainOptions:
    """Every option of `python -m mr1fast.train` with its help; None where the default depends on other options."""

    method: str = option(
        "grpo-d",
        "training method: GRPO-D, whose KL weight changes during training; GRPO, with a constant KL weight; or "
        "supervised fine-tuning",
        group="model",
        choices=METHODS,
    )
    model: str | None = option(
        None,
        "Qwen2-VL or Qwen2.5-VL to start from: a folder, or a name on the Hugging Face hub",
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
        "train a LoRA adapter of this rank, and none of the model's own weights",
        group="model",
        at_least=1,
        at_most=4096,
        shown="none",
    )
    lora_alpha: float | None = option(
        None,
        "the adapter is scaled by --lora-alpha / --lora-rank",
        group="model",
        at_least=1e-3,
        at_most=1e6,
        shown="2 x --lora-rank",
    )
    lora_targets: str | None = option(
        None,
        "linear layers on which the adapter is, separated by commas, such as q_proj,v_proj",
        group="model",
        metavar="LIST",
        shown="all those of the language model",
    )
    merge: bool = option(
        False,
        "after LoRA, save the model with the adapter merged into its weights as model/, and the adapter as adapter/",
        group="model",
    )
    task: str | None = option(
        None,
        f"embedded task to train on: {' or '.join(f'{name} ({task.title})' for name, task in TASKS.items())}; "
        f"{','.join(TASKS)} trains a separate model on each, one after the other",
        group="data",
        metavar="NAME",
        shown=f"{','.join(TASKS)}, or none with --data",
    )
    data: str | None = option(
        None,
        "your own data instead of a task: a folder, a .jsonl, .json, .csv or .parquet file, or a name on the Hugging "
        "Face hub; with the columns image, problem and solution, or others that docs/data.md names",
        group="data",
        metavar="PATH",
        shown="none",
    )
    columns: str | None = option(
        None,
        f"what the columns of your data are called, such as {EXAMPLE}",
        group="data",
        metavar="LIST",
        shown="the names in docs/data.md",
    )
    image_root: str | None = option(
        None,
        "folder at which relative paths of images start",
        group="data",
        metavar="DIR",
        shown="that of the file which names them",
    )
    train_samples: int | None = option(
        None,
        "few-shot: train on this many examples alone, drawn from those for training by --seed",
        group="data",
        at_least=1,
        at_most=MANY,
        shown="all",
    )
    test_data: str | None = option(
        None,
        "data to test on before and after training, like --data, or an embedded task; may be given several times, or "
        "be a list separated by commas",
        group="data",
        metavar="PATH",
        shown="the test split of --data",
        several=True,
    )
    prompt_suffix: str | None = option(
        None,
        "text that follows every question, after a space; '' for none",
        group="data",
        metavar="TEXT",
        shown="the paper's, which asks for <think> and <answer>, or what --model was trained with",
        blank=True,
    )
    system_prompt: str | None = option(
        None,
        "text of the system turn before every question",
        group="data",
        metavar="TEXT",
        shown="that of the model's chat template, or what --model was trained with",
    )
    max_pixels: int | None = option(
        None,
        "largest image that the model is shown, as width x height; larger images are scaled down to it",
        group="data",
        unit="pixels",
        at_least=1,
        at_most=MANY,
        shown="set by the model's processor",
    )
    max_prompt_length: int | None = option(
        None,
        "longest prompt, image included; problems with a longer one are left out",
        group="data",
        unit="tokens",
        at_least=1,
        at_most=1_000_000,
        shown="what the model accepts, less --max-completion-length",
    )
    reward_weights: str = option(
        DEFAULT_REWARDS,
        "what is rewarded: name=weight, separated by commas; names are accuracy (is the answer right?), format (are "
        "the tags right?), r1v-counting and r1v-geometry (is the answer right as R1-V's evaluations count?), and "
        f"module:function, a Python function of your own, {FORM}",
        group="reward",
        metavar="LIST",
    )
    num_generations: int = option(
        8,
        "completions sampled for each prompt; they form a group, and each is compared with the group's mean reward",
        group="sampling",
        at_least=2,
        at_most=4096,
    )
    prompts_per_step: int | Mapping[str, int] | None = option(
        None,
        "number of prompts in each batch",
        group="sampling",
        at_least=1,
        at_most=4096,
        why="they are held in memory together",
        shown=_by_recipe("prompts_per_step"),
    )
    max_completion_length: int | Mapping[str, int] | None = option(
        None,
        "longest completion; one that has not ended by then is cut off",
        group="sampling",
        unit="tokens",
        at_least=1,
        at_most=1_000_000,
        why="no such model accepts that many tokens",
        shown=_by_recipe("max_completion_length"),
    )
    temperature: float = option(
        1.0,
        "sampling temperature, by which the logits in the loss are divided as well",
        group="sampling",
        at_least=0.01,
        at_most=100.0,
        why="logits are divided by it",
    )
    top_k: int = option(
        0,
        "sample each token from this many likeliest ones; 0 for all",
        group="sampling",
        unit="tokens",
        at_least=0,
        at_most=MANY,
    )
    top_p: float = option(
        1.0,
        "sample each token from the likeliest ones that have this probability together; 1 for all",
        group="sampling",
        at_least=1e-6,
        at_most=1.0,
        why="it is a probability",
    )
    seed: int = option(0, "seed for shuffling the prompts and for sampling", group="sampling", at_least=0)

    beta: float | None = option(
        None, "constant KL weight", group="kl", at_least=0, at_most=1000, why=BETA_WHY, shown=_of_method("beta")
    )
    beta_min: float | None = option(
        None, "lowest KL weight", group="kl", at_least=0, at_most=1000, why=BETA_WHY, shown=_of_method("beta_min")
    )
    beta_max: float | None = option(
        None, "highest KL weight", group="kl", at_least=0, at_most=1000, why=BETA_WHY, shown=_of_method("beta_max")
    )
    kl_schedule: str | None = option(
        None,
        "course of the KL weight, bounded by --beta-min and --beta-max; paper is Eq. 3 of OThink-MR1, constant stays "
        "at --beta-max, adaptive aims for --target-kl",
        group="kl",
        choices=ALL_SCHEDULES,
        shown=_of_method("kl_schedule"),
    )
    explore_fraction: float | None = option(
        None,
        "fraction of the steps that Eq. 3 spends exploring, that is, lowering the KL weight to --beta-min",
        group="kl",
        at_least=0,
        below=1,
        shown=f"{KL_DEFAULTS['grpo-d']['explore_fraction']}; --kl-schedule {' and '.join(EXPLORING)} only",
    )
    target_kl: float | None = option(
        None,
        "KL divergence from the base model that the adaptive schedule aims for",
        group="kl",
        unit="nats per token",
        at_least=1e-6,
        at_most=1000,
        why="a lower target is lost in rounding, and a higher one is never reached",
        shown="none; --kl-schedule adaptive only, which requires it",
    )
    reference_model: str | None = option(
        None,
        "model from which the KL term measures, a folder or a name on the hub; to train a model further, give the one "
        "that its training began with",
        group="kl",
        metavar="DIR",
        shown="--model; with LoRA, without its adapter",
    )

    learning_rate: float | Mapping[str, float] | None = option(
        None,
        "peak learning rate of AdamW, reached after --warmup-steps",
        group="optimizer",
        at_least=1e-12,
        at_most=1.0,
        why="AdamW moves each weight by about that much in a step",
        shown=f"{_by_recipe('learning_rate')}; ten times that for LoRA",
    )
    warmup_steps: int = option(
        10,
        "optimizer steps over which the learning rate rises to its peak",
        group="optimizer",
        at_least=0,
        at_most=MANY,
    )
    epochs: float | None = option(
        None,
        "passes over the training examples, in place of --max-steps",
        group="optimizer",
        at_least=1e-6,
        at_most=1_000_000,
        shown="none",
    )
    max_steps: int | Mapping[str, int] | None = option(
        None,
        "total number of optimizer steps; after the warmup the learning rate falls linearly towards 0",
        group="optimizer",
        at_least=1,
        at_most=MANY,
        shown=_by_recipe("max_steps"),
    )
    num_iterations: int = option(
        1,
        "optimizer steps taken on each batch of completions before new ones are sampled",
        group="optimizer",
        at_least=1,
        at_most=MANY,
    )
    gradient_accumulation_steps: int | Mapping[str, int] | None = option(
        None,
        "number of pieces in which a batch passes through the model, to save memory; the gradient is the same",
        group="optimizer",
        at_least=1,
        shown="1 for small models, --prompts-per-step for others, which is one prompt at a time",
        machine=True,
    )
    max_grad_norm: float = option(
        1.0,
        "largest norm of the gradient; a gradient with a larger norm is scaled down to it",
        group="optimizer",
        at_least=1e-6,
        why="AdamW treats gradients far below 1e-8 as 0",
    )

    eval_samples: int | None = option(
        None,
        "largest number of test problems, of each data set, to answer before and after training; 0 turns this off"
        f"{_at_most('test')}",
        group="evaluation",
        at_least=0,
        at_most=1_000_000,
        shown=f"{DEFAULT_EVAL_SAMPLES} of a task or of --data, all of --test-data",
    )
    eval_steps: int = option(
        50,
        "steps between evaluations on the validation split; 0 turns them off",
        group="evaluation",
        at_least=0,
        at_most=MANY,
    )
    eval_validation_samples: int = option(
        128,
        f"number of validation problems in each of these evaluations{_at_most('validation')}",
        group="evaluation",
        at_least=1,
        at_most=1_000_000,
    )

    eval_sampled: int = option(
        1,
        "completions to sample for each problem in all of these evaluations, besides the greedy one; 0 for none",
        group="evaluation",
        at_least=0,
        at_most=4096,
    )
    eval_batch_size: int | None = option(
        None,
        "problems answered at once; fewer take less memory (may be changed when a run is resumed)",
        group="evaluation",
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
        metavar="KEY=VALUE",
        shown="none",
        several=True,
        pairs=True,
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
        at_least=1,
        at_most=MANY,
    )
    save_total_limit: int = option(
        2, "number of checkpoints to keep; older ones are deleted", group="files", at_least=1, at_most=MANY
    )
    save_only_model: bool = option(
        False,
        "write checkpoints without the optimizer's state, which is most of their size; training cannot be resumed from "
        "such a checkpoint",
        group="files",
        machine=True,
    )

    report_to: str = option(
        "tensorboard",
        f"where metrics and samples of the completions are shown, separated by commas: {', '.join(LOGGERS)}, or none; "
        "metrics.jsonl has the metrics in any case",
        group="logging",
        metavar="LIST",
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
    threads: int | None = option(
        None,
        "number of CPU threads to use",
        group="device",
        at_least=1,
        at_most=1024,
        shown="1 for a small model, else all CPUs",
        machine=True,
    )
