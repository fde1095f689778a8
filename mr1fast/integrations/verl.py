"""GRPO-D in verl (0.9.1): the policy loss `grpo_d` and the dynamic KL weight as a verl KL controller.

    VERL_USE_EXTERNAL_MODULES=mr1fast.integrations.verl python -m verl.trainer.main_ppo \\
        actor_rollout_ref.actor.policy_loss.loss_mode=grpo_d ...

Importing this module registers the loss (verl_loss.py) where verl is installed; it works without verl, too, and
`policy_loss.objective` makes it another one of verl's losses. The KL weight comes in where verl has it: `KLController`
for the penalty in the reward (`trainer.kl_ctrl_in_reward`), and for the term in the loss (`use_kl_loss`), which is the
paper's, either `PolicyLossConfig`, by configuration alone, or `set_kl_loss_coef`.

`python -m mr1fast.integrations.verl export` writes a run of `mr1fast.train` for verl, see `verl_export`.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mr1fast.checks import choice
from mr1fast.integrations.verl_loss import AGGREGATIONS as AGGREGATIONS
from mr1fast.integrations.verl_loss import OBJECTIVES as OBJECTIVES
from mr1fast.integrations.verl_loss import grpo_d as grpo_d
from mr1fast.integrations.versions import check_version
from mr1fast.losses.hidden import linear_token_logprobs
from mr1fast.losses.kl_weight import KLSchedule, kl_weight

TESTED = "0.9.1"


class KLController(KLSchedule):
    """`KLSchedule` as verl's trainer drives its controllers: `.value`, and `.update(...)` once per training step.

    >>> trainer.kl_ctrl_in_reward = KLController(total_training_steps, trainer=trainer, beta_min=0.0, beta_max=0.02)

    trainer: verl's trainer (anything with `global_steps`, which counts from 1). The step is taken from it, and so is
    right after a resume, too: verl saves no controller. Without it the steps are the updates; then, and for the weight
    of schedule="adaptive" in any case, it is for you to save `state_dict()` and to load it.
    """

    def __init__(self, total_steps: int, *, trainer: Any = None, **options: Any):
        super().__init__(total_steps, **options)
        self.trainer = trainer

    @property
    def value(self) -> float:
        """The weight of the step that the trainer is at."""
        if self.trainer is not None:
            self.steps_done = max(int(self.trainer.global_steps) - 1, 0)
        return super().value

    def update(self, current_kl: float, n_steps: int) -> None:
        """Count one training step. current_kl (nats per token) and n_steps matter to schedule="adaptive" alone."""
        super().update(current_kl, n_steps)
        if self.trainer is None:
            self.step()


def set_kl_loss_coef(config: Any, value: float) -> None:
    """Set the weight of verl's KL loss in a worker's ActorConfig, whose fields are frozen.

    verl reads `kl_loss_coef` at every micro-batch: calling this with `controller.value` before an update is what makes
    the weight of `use_kl_loss` dynamic. Raises ValueError where there is no such field.
    """
    if not hasattr(config, "kl_loss_coef"):
        raise ValueError(f"config must have a field kl_loss_coef (verl's ActorConfig), got {type(config).__name__}")
    object.__setattr__(config, "kl_loss_coef", float(value))


@functools.cache
def _policy_loss_config() -> type:
    """A class, since what it is derived from exists only where verl does."""
    from verl.workers.config import PolicyLossConfig as Base

    @dataclass
    class PolicyLossConfig(Base):
        """verl's settings of a policy loss and the keywords of `kl_weight`, for `loss_mode="grpo_d"`.

        objective: which of verl's losses it is (`verl_loss.OBJECTIVES`), with that one's settings in the places that
        verl has for them.
        With beta_max the weight of verl's KL loss (`actor.use_kl_loss`) follows the schedule, over the training steps
        that verl's own learning-rate schedule counts and its checkpoints keep. Without, it stays `kl_loss_coef`.
        """

        objective: str = "vanilla"
        kl_schedule: str = "paper"
        beta_min: float = 0.0
        beta_max: float | None = None
        explore_fraction: float = 0.3

        def __post_init__(self) -> None:
            choice("policy_loss.objective", self.objective, OBJECTIVES)
            if self.objective != "vanilla" and self.loss_mode != "grpo_d":
                raise ValueError(f"policy_loss.loss_mode must be 'grpo_d' with objective, got {self.loss_mode!r}")
            if self.beta_max is None:
                return
            if self.loss_mode != "grpo_d":
                raise ValueError(f"policy_loss.loss_mode must be 'grpo_d' with beta_max, got {self.loss_mode!r}")
            _weight(self, 0, 1)
            _follow_schedules()

    PolicyLossConfig.__qualname__ = "PolicyLossConfig"  # as it is found by pickle
    return PolicyLossConfig


def __getattr__(name: str) -> Any:
    if name == "PolicyLossConfig":
        return _policy_loss_config()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _weight(policy_loss: Any, step: int, total_steps: int) -> float:
    return kl_weight(
        step,
        total_steps,
        schedule=policy_loss.kl_schedule,
        beta_min=policy_loss.beta_min,
        beta_max=policy_loss.beta_max,
        explore_fraction=policy_loss.explore_fraction,
    )


@functools.cache
def _follow_schedules() -> None:
    """From now on every training step of a worker in this process begins with setting its KL weight."""
    from verl.workers import engine_workers

    worker: Any = engine_workers.TrainingWorker
    original = worker.train_mini_batch

    @functools.wraps(original)  # with the marks that verl's dispatch looks for
    def train_mini_batch(self: Any, *args: Any, **kwargs: Any) -> Any:
        _set_weight(self)
        return original(self, *args, **kwargs)

    worker.train_mini_batch = train_mini_batch


def _set_weight(worker: Any) -> None:
    config: Any = getattr(worker.loss_fn, "keywords", {}).get("config")
    policy_loss = getattr(config, "policy_loss", None)
    if getattr(policy_loss, "beta_max", None) is None:
        return
    if not config.use_kl_loss:
        raise ValueError("actor.use_kl_loss must be True with policy_loss.beta_max, which is the weight of that loss")
    done = getattr(worker.engine.lr_scheduler, "last_epoch", None)
    if done is None:
        raise ValueError(
            "policy_loss.beta_max needs a learning-rate schedule of torch, which counts the steps (verl's FSDP "
            f"engine), got {type(worker.engine.lr_scheduler).__name__}; call set_kl_loss_coef instead"
        )
    set_kl_loss_coef(config, _weight(policy_loss, done, config.optim.total_training_steps))


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies [T] in the shape of verl's `verl.utils.kernel.linear_cross_entropy`.

    hidden: [..., H], T rows in all; weight: [V, H]; labels: T of them. Both results are float32 and differentiable in
    hidden and weight. Raises ValueError for another reduction than "none" (verl asks for no other) and for a vocabulary
    that is divided among processes.
    """
    choice("reduction", reduction, ["none"])
    if dist_process_group is not None and torch.distributed.get_world_size(dist_process_group) > 1:
        raise ValueError("dist_process_group must be None or of one process: weight must hold the whole vocabulary")
    rows = hidden.reshape(1, -1, hidden.shape[-1])
    logps, entropies = linear_token_logprobs(rows, weight, labels.reshape(1, -1), temperature=temperature, entropy=True)
    return logps[0], entropies[0]


def register() -> None:
    """Make `grpo_d` known to verl. Raises ImportError for a verl whose registry or loss has another signature."""
    import verl
    from verl.trainer.ppo import core_algos

    needs = {
        "register_policy_loss": (getattr(core_algos, "register_policy_loss", None), ["name"]),
        "compute_policy_loss_vanilla": (
            getattr(core_algos, "compute_policy_loss_vanilla", None),
            [
                "old_log_prob",
                "log_prob",
                "advantages",
                "response_mask",
                "loss_agg_mode",
                "config",
                "rollout_is_weights",
            ],
        ),
    }
    check_version("verl", getattr(verl, "__version__", "of unknown version"), TESTED, needs)
    core_algos.register_policy_loss("grpo_d")(grpo_d)


if __name__ != "__main__" and importlib.util.find_spec("verl") is not None:
    register()


if __name__ == "__main__":
    from mr1fast.integrations.verl_export import main

    sys.exit(main())
