"""How the model learns: what is sampled, and what the loss and the optimizer make of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mr1fast.losses.kl_weight import ALL_SCHEDULES, EXPLORING
from mr1fast.options.fields import MANY, PAIRS, option
from mr1fast.options.loss_keywords import DEFAULT_LOSS
from mr1fast.options.recipes import KL_DEFAULTS, R1_V, RECIPES, TASK_NAMES

# A step with --dynamic-sampling samples at most so many times its prompts, as in verl's recipe for DAPO.
MOST_BATCHES = 10
BETA_WHY = "rewards are of the order of 1, so the KL term would drown out the rest of the loss"


def _by_recipe(name: str) -> str:
    first, *others = TASK_NAMES
    small, large = str(RECIPES[first][name]), str(RECIPES[R1_V][name])
    values = {task: str(RECIPES[task][name]) for task in others}
    differ = ", ".join(f"{task}: {value}" for task, value in values.items() if value != small)
    if not differ and small == large:
        return small
    small = f"{small} ({differ})" if differ else small
    return f"{small} for small models, {large} for others"


def _of_method(name: str) -> str:
    method = next(method for method, values in KL_DEFAULTS.items() if name in values)
    return f"{KL_DEFAULTS[method][name]}; --method {method} only"


@dataclass(frozen=True)
class LearningOptions:
    """Sampling, KL term, optimizer."""

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
    dynamic_sampling: bool = option(
        False,
        "replace groups whose rewards all agree, from which nothing can be learnt, by those of further prompts (DAPO); "
        f"a step samples at most {MOST_BATCHES} times its prompts",
        group="sampling",
    )
    seed: int = option(0, "seed for shuffling the prompts and for sampling", group="sampling", at_least=0)

    loss: str = option(
        DEFAULT_LOSS,
        "loss of GRPO, by keywords of mr1fast.grpo_loss such as loss_type=dapo,epsilon_high=0.28,scale_rewards=none; a "
        "wrong name is answered with all that there are, and docs/training.md explains them",
        group="loss",
        metavar=PAIRS,
    )
    mask_truncated: bool = option(
        False,
        "leave completions that were cut off out of the loss, and out of the number of tokens by which it is divided",
        group="loss",
    )
    beta: float | None = option(
        None, "constant KL weight", group="loss", at_least=0, at_most=1000, why=BETA_WHY, shown=_of_method("beta")
    )
    beta_min: float | None = option(
        None, "lowest KL weight", group="loss", at_least=0, at_most=1000, why=BETA_WHY, shown=_of_method("beta_min")
    )
    beta_max: float | None = option(
        None, "highest KL weight", group="loss", at_least=0, at_most=1000, why=BETA_WHY, shown=_of_method("beta_max")
    )
    kl_schedule: str | None = option(
        None,
        "course of the KL weight, bounded by --beta-min and --beta-max; paper is Eq. 3 of OThink-MR1, constant stays "
        "at --beta-max, adaptive aims for --target-kl",
        group="loss",
        key_of="kl",
        choices=ALL_SCHEDULES,
        shown=_of_method("kl_schedule"),
    )
    explore_fraction: float | None = option(
        None,
        "fraction of the steps that Eq. 3 spends exploring, that is, lowering the KL weight to --beta-min",
        group="loss",
        key_of="kl",
        at_least=0,
        below=1,
        shown=f"{KL_DEFAULTS['grpo-d']['explore_fraction']}; --kl-schedule {' and '.join(EXPLORING)} only",
    )
    target_kl: float | None = option(
        None,
        "KL divergence from the base model that the adaptive schedule aims for",
        group="loss",
        key_of="kl",
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
        group="loss",
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
        "number of equal pieces in which a batch passes through the model, to save memory; the gradient is the same",
        group="optimizer",
        at_least=1,
        shown="1 for small models; see --tokens-per-microbatch for others",
        machine=True,
    )
    tokens_per_microbatch: int | None = option(
        None,
        "most that passes through the model at a time, patches of images included; prompts, each with its "
        "completions, make pieces of up to that, in place of --gradient-accumulation-steps; the gradient is the same",
        group="optimizer",
        unit="tokens",
        at_least=1,
        at_most=MANY,
        shown="for models that are not small, what fits in memory by --plan",
        machine=True,
    )
    gradient_checkpointing: str = option(
        "auto",
        "compute the layers' activations again in backward instead of keeping them, which takes less memory and more "
        "time; auto does so where a step does not fit otherwise",
        group="optimizer",
        choices=("auto", "on", "off"),
        machine=True,
    )
    max_grad_norm: float = option(
        1.0,
        "largest norm of the gradient; a gradient with a larger norm is scaled down to it",
        group="optimizer",
        at_least=1e-6,
        why="AdamW treats gradients far below 1e-8 as 0",
    )
