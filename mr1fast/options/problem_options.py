"""What is trained, on which problems, and for which rewards."""

from __future__ import annotations

from dataclasses import dataclass

from mr1fast.data.columns import EXAMPLE
from mr1fast.data.tasks import TASKS
from mr1fast.options.fields import LIST, MANY, PAIRS, option
from mr1fast.options.recipes import KL_DEFAULTS
from mr1fast.options.reward_weights import DEFAULT_REWARDS
from mr1fast.rewards.own import FORM

METHODS = tuple(KL_DEFAULTS)
# What --freeze knows; `Policy.freeze_parts` says which weights they are.
PARTS = ("vision", "merger", "language")


@dataclass(frozen=True)
class ProblemOptions:
    """Model and method, data, rewards."""

    method: str = option(
        "grpo-d",
        "training method: GRPO-D, whose KL weight changes during training; GRPO, with a constant KL weight; or "
        "supervised fine-tuning",
        group="model",
        choices=METHODS,
    )
    sft_reasoning: bool = option(
        False,
        "supervised fine-tuning imitates reasoning too, which is in the column reasoning of your data; rows without it "
        "are left out",
        group="model",
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
        metavar=LIST,
        shown="none",
    )
    lora_rank: int | None = option(
        None,
        "rank of the adapter; without one there is none",
        group="model",
        key_of="lora",
        at_least=1,
        at_most=4096,
        shown="none",
    )
    lora_alpha: float | None = option(
        None,
        "the adapter is scaled by alpha / rank",
        group="model",
        key_of="lora",
        at_least=1e-3,
        at_most=1e6,
        shown="2 x rank",
    )
    lora_targets: str | None = option(
        None,
        "linear layers that have an adapter",
        group="model",
        key_of="lora",
        metavar=LIST,
        shown="all those of the language model",
    )
    merge: bool = option(
        False,
        "save the whole model, with the adapter merged into its weights, as model/, and the adapter as adapter/",
        group="model",
        key_of="lora",
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
        metavar=PAIRS,
        shown="the names in docs/data.md",
    )
    image_root: str | None = option(
        None,
        "folder at which relative paths of images start",
        group="data",
        metavar="DIR",
        shown="that of the file which names them",
    )
    allow_outside: bool = option(
        False,
        "read images whose paths lead out of the folder of the data and that of --image-root",
        group="data",
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
        metavar=PAIRS,
    )
