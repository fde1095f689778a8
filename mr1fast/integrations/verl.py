"""GRPO-D in verl (0.9.1): the policy loss `grpo_d` and the dynamic KL weight as a verl KL controller.

    VERL_USE_EXTERNAL_MODULES=mr1fast.integrations.verl python -m verl.trainer.main_ppo \\
        actor_rollout_ref.actor.policy_loss.loss_mode=grpo_d ...

Importing this module registers the loss where verl is installed; it works without verl, too (`grpo_d` is a function of
tensors). The KL weight comes in where verl has it: `KLController` for the penalty in the reward
(`trainer.kl_ctrl_in_reward`), `set_kl_loss_coef` for the term in the loss (`use_kl_loss`), which is the paper's.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from mr1fast.checks import choice
from mr1fast.integrations.versions import check_version
from mr1fast.kernels import reference
from mr1fast.losses import arguments
from mr1fast.losses.kl_weight import KLSchedule
from mr1fast.losses.layout import layout_of
from mr1fast.losses.options import LossOptions, completed

TESTED = "0.9.1"
AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")


def grpo_d(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """The clipped policy term, as verl's registry of policy losses wants it; verl adds the KL and entropy terms.

    Args:
        old_log_prob, log_prob, response_mask: [B, L]. Whatever stands at masked positions does not matter.
        advantages: [B, L] or [B].
        loss_agg_mode: one of `AGGREGATIONS`.
        config: verl's ActorConfig, or any object or mapping with `clip_ratio`, `clip_ratio_low`, `clip_ratio_high`,
            `clip_ratio_c` (dual clip: bounds the ratio, which matters where the advantage is negative; None for the
            paper's loss) and `global_batch_info`; what is missing or None has verl's meaning. Without a config: 0.2
            and no dual clip.
        rollout_is_weights: [B, L] or [B, 1], correction for the rollout engine; multiplies the policy term.

    Returns the loss (0-d, differentiable in log_prob) and verl's metrics as floats: actor/pg_clipfrac, actor/ppo_kl,
    actor/pg_clipfrac_lower. Raises ValueError for a bad argument, by name.
    """
    log_prob, layout = layout_of("log_prob", log_prob)
    choice("loss_agg_mode", loss_agg_mode, AGGREGATIONS)
    epsilon = _setting(config, "clip_ratio", 0.2)
    epsilon_high = _setting(config, "clip_ratio_high", epsilon)
    dual_clip = _setting(config, "clip_ratio_c", None)
    if dual_clip is not None and dual_clip <= 1 + epsilon_high:
        raise ValueError(f"clip_ratio_c must be above 1 + clip_ratio_high = {1 + epsilon_high}, got {dual_clip}")
    options: LossOptions = {
        "epsilon_low": _setting(config, "clip_ratio_low", epsilon),
        "epsilon_high": epsilon_high,
        "delta": dual_clip,
        "completion_mask": response_mask,
        "old_per_token_logps": old_log_prob,
        "importance_sampling_ratio": rollout_is_weights,
    }
    dtype = reference.compute_dtype(log_prob.dtype)
    no_ids = torch.zeros_like(log_prob, dtype=torch.int64)  # the log-probabilities are there already
    spec, batch = arguments.loss_call(dtype, layout, no_ids, advantages, completed(grpo_d, options))
    mask = torch.ones_like(log_prob, dtype=torch.bool) if batch.mask is None else batch.mask
    logps = torch.where(mask, log_prob.to(dtype), 0)
    per_token, _, is_low, is_high = reference.objective(logps, batch, spec)
    loss = _aggregate(per_token, mask, loss_agg_mode, **(_setting(config, "global_batch_info", None) or {}))

    with torch.no_grad():
        assert batch.old_logps is not None
        assert batch.advantages is not None
        tokens = mask.sum().clamp(min=1)
        log_ratio = torch.where(mask, logps - batch.old_logps, 0)
        above = torch.zeros_like(mask)
        if dual_clip is not None:
            above = (reference.saturating_exp(log_ratio) > dual_clip) & (batch.advantages < 0) & mask
        means = torch.stack([(is_low | is_high).sum(), -log_ratio.sum(), above.sum()]) / tokens
    names = ("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower")
    return loss, dict(zip(names, means.tolist()))


def _aggregate(
    per_token: Tensor,
    mask: Tensor,
    mode: str,
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> Tensor:
    """verl's aggregation of the per-token loss [B, L] (0 where masked) over the global batch of `dp_size` processes.

    A completion without tokens does not count as one. A batch without any gives 0 where verl gives NaN.
    """
    if mode == "token-sum":
        return per_token.sum() * dp_size
    if dp_size > 1:
        name, value = "global_batch_size", global_batch_size
        if mode == "token-mean":
            name, value = "batch_num_tokens", batch_num_tokens
        if value is None:
            raise ValueError(f"{name} must be given for loss_agg_mode={mode!r} with dp_size {dp_size}, got None")
    if mode == "token-mean":
        count = mask.sum().clamp(min=1) if batch_num_tokens is None else batch_num_tokens
        return per_token.sum() / count * dp_size
    lengths = mask.sum(1)
    per_completion = per_token.sum(1)
    if mode == "seq-mean-token-mean":
        per_completion = per_completion / lengths.clamp(min=1)
    elif mode == "seq-mean-token-sum-norm":
        per_completion = per_completion / (mask.shape[1] if loss_scale_factor is None else loss_scale_factor)
    count = (lengths > 0).sum().clamp(min=1) if global_batch_size is None else global_batch_size
    return per_completion.sum() / count * dp_size


def _setting(config: Any, name: str, default: Any) -> Any:
    value = config.get(name) if hasattr(config, "get") else getattr(config, name, None)
    return default if value is None else value


class KLController(KLSchedule):
    """`KLSchedule` as verl's trainer drives its controllers: `.value`, and `.update(...)` once per training step.

    >>> trainer.kl_ctrl_in_reward = KLController(total_training_steps, beta_min=0.0, beta_max=0.02)
    """

    def update(self, current_kl: float, n_steps: int) -> None:
        """Count one training step. current_kl (nats per token) and n_steps matter to schedule="adaptive" alone."""
        super().update(current_kl, n_steps)
        self.step()


def set_kl_loss_coef(config: Any, value: float) -> None:
    """Set the weight of verl's KL loss in a worker's ActorConfig, whose fields are frozen.

    verl reads `kl_loss_coef` at every micro-batch: calling this with `controller.value` before an update is what makes
    the weight of `use_kl_loss` dynamic. Raises ValueError where there is no such field.
    """
    if not hasattr(config, "kl_loss_coef"):
        raise ValueError(f"config must have a field kl_loss_coef (verl's ActorConfig), got {type(config).__name__}")
    object.__setattr__(config, "kl_loss_coef", float(value))


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


if importlib.util.find_spec("verl") is not None:
    register()
