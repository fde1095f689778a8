"""verl's policy losses on our objectives: `grpo_d`, a function of log-probabilities with verl's arguments.

It needs no verl. Which of verl's losses it is, `policy_loss.objective` says, by verl's own names; the settings of each
are read from where verl has them, and the numbers are verl's.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mr1fast.checks import choice, number
from mr1fast.kernels import reference
from mr1fast.losses import arguments
from mr1fast.losses.keywords import completed
from mr1fast.losses.layout import layout_of
from mr1fast.losses.options import LossOptions

AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
OBJECTIVES = ("vanilla", "gspo", "sapo", "cispo", "geo_mean", "dppo_tv", "dppo_kl", "clip_cov", "kl_cov")
_LARGEST_LOG_RATIO = 20.0  # verl's, against overflow
_CUTS_LOG_RATIO = ("vanilla", "sapo", "cispo", "dppo_tv", "dppo_kl")  # the others do not


def grpo_d(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """The policy term, as verl's registry of policy losses wants it; verl adds the KL and entropy terms.

    Args:
        old_log_prob, log_prob, response_mask: [B, L]. Whatever stands at masked positions does not matter.
        advantages: [B, L] or [B].
        loss_agg_mode: one of `AGGREGATIONS`; "sapo" and "geo_mean" have one of their own, as in verl.
        config: verl's ActorConfig, or any object or mapping with `clip_ratio`, `clip_ratio_low`, `clip_ratio_high`,
            `clip_ratio_c` (dual clip: bounds the ratio where the advantage is negative; above 1; 3 if it is missing,
            as in verl; None for the paper's loss, without one), `global_batch_info`, and `policy_loss` with
            `objective`, one of `OBJECTIVES`, and its settings. What else is missing or None has verl's meaning. Without
            a config: "vanilla", 0.2 and no dual clip.
        rollout_is_weights: [B, L] or [B, 1], correction for the rollout engine; multiplies the policy term.

    As in verl the log-ratio is cut at +-20 where it could overflow. Returns the loss (0-d, differentiable in log_prob)
    and verl's metrics as floats: actor/pg_clipfrac, actor/ppo_kl, actor/pg_clipfrac_lower. Raises ValueError for a bad
    argument, by name.
    """
    log_prob, layout = layout_of("log_prob", log_prob)
    choice("loss_agg_mode", loss_agg_mode, AGGREGATIONS)
    objective = _setting(_get(config, "policy_loss", None), "objective", "vanilla")
    options: LossOptions = {
        **_options(choice("policy_loss.objective", objective, OBJECTIVES), config),
        "completion_mask": response_mask,
        "old_per_token_logps": old_log_prob,
        "importance_sampling_ratio": rollout_is_weights,
    }
    if objective == "geo_mean" and rollout_is_weights is not None:
        options["importance_sampling_ratio"] = _geometric_mean(rollout_is_weights, response_mask)
    dtype = reference.compute_dtype(log_prob.dtype)
    no_ids = torch.zeros_like(log_prob, dtype=torch.int64)  # the log-probabilities are there already
    spec, batch = arguments.loss_call(dtype, layout, no_ids, advantages, completed(grpo_d, options))
    mask = torch.ones_like(log_prob, dtype=torch.bool) if batch.mask is None else batch.mask
    assert batch.old_logps is not None
    logps = torch.where(mask, log_prob.to(dtype), 0)
    old_logps = torch.where(mask, batch.old_logps, 0)
    whole = log_ratio = logps - old_logps
    if objective in _CUTS_LOG_RATIO:
        log_ratio = whole.clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)
    if objective in (
        "vanilla",
        "sapo",
    ):  # whose terms are functions of the ratio alone; bit for bit where it is not cut
        logps = torch.where(log_ratio == whole, logps, old_logps + log_ratio)
    per_token, _, is_low, is_high = reference.objective(logps, batch, spec)

    if objective == "geo_mean":
        loss = (per_token.sum(1) / mask.sum(1).clamp(min=1)).mean()
    else:
        mode = "seq-mean-token-mean" if objective == "sapo" else loss_agg_mode
        loss = _aggregate(per_token, mask, mode, **(_setting(config, "global_batch_info", None) or {}))
    return loss, _metrics(objective, log_ratio.detach(), is_low | is_high, mask, batch, spec)


def _options(objective: str, config: Any) -> LossOptions:
    """The keywords of our loss for one of verl's objectives with verl's settings."""
    epsilon, policy_loss = _setting(config, "clip_ratio", 0.2), _get(config, "policy_loss", None)
    options: LossOptions = {
        "epsilon_low": _setting(config, "clip_ratio_low", epsilon),
        "epsilon_high": _setting(config, "clip_ratio_high", epsilon),
    }
    if objective == "vanilla":
        dual_clip = None if config is None else _get(config, "clip_ratio_c", 3.0)
        if dual_clip is not None:
            options["clip_ratio_c"] = number("clip_ratio_c", dual_clip, above=1)
    elif objective in ("dppo_tv", "dppo_kl"):
        options |= {"loss_type": objective, "clip_ratio_c": _get(config, "clip_ratio_c", 20.0)}
    elif objective == "gspo":  # verl cuts the logarithm of this ratio at 10
        options |= {"importance_sampling_level": "sequence_token", "clip_ratio_c": math.exp(10)}
    elif objective == "sapo":
        tau_pos, tau_neg = _setting(config, "tau_pos", 1.0), _setting(config, "tau_neg", 1.05)
        options |= {"loss_type": "sapo", "sapo_temperature_pos": tau_pos, "sapo_temperature_neg": tau_neg}
    else:
        names = {"cispo": "cispo_two_sided", "geo_mean": "gmpo"}
        options["loss_type"] = names.get(objective, objective)
    for name in ("clip_cov_ratio", "clip_cov_lb", "clip_cov_ub", "kl_cov_ratio", "ppo_kl_coef"):
        value = _get(policy_loss, name, None)
        if value is not None and objective in ("clip_cov", "kl_cov"):
            options[name] = value  # type: ignore[literal-required]
    return options


def _geometric_mean(weights: Tensor, response_mask: Tensor) -> Tensor:
    """[B], the geometric mean of each completion's weights."""
    mask = response_mask != 0
    logs = torch.where(mask, (weights.expand(mask.shape) + 1e-10).log(), 0)
    return (logs.sum(1) / mask.sum(1).clamp(min=1)).exp()


@torch.no_grad()
def _metrics(
    objective: str, log_ratio: Tensor, cut: Tensor, mask: Tensor, batch: reference.LossBatch, spec: reference.LossSpec
) -> dict[str, Any]:
    """verl's metrics; cut: the tokens that our objective flags."""
    advantages, ratio = reference.token_advantages(batch), log_ratio.exp()
    beyond, ppo_kl = torch.zeros_like(cut), -log_ratio
    if objective == "vanilla":
        beyond = (ratio > spec.clip_ratio_c) & (advantages < 0)
    elif objective.startswith("dppo"):
        beyond = (ratio > spec.clip_ratio_c) & ~cut
    elif objective == "geo_mean":
        outside = (log_ratio < -spec.epsilon_low) | (log_ratio > spec.epsilon_high)
        cut, beyond = outside & (advantages > 0), outside & (advantages < 0)
    elif objective == "kl_cov":
        ppo_kl = log_ratio.abs()
    sums = torch.stack([torch.where(mask, values, 0).sum() for values in (cut, ppo_kl, beyond)])
    names = ("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower")
    return dict(zip(names, (sums / mask.sum().clamp(min=1)).tolist()))


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


def _get(config: Any, name: str, default: Any) -> Any:
    """The entry of a mapping, or the attribute of any other object; `default` where there is none."""
    return config.get(name, default) if hasattr(config, "get") else getattr(config, name, default)


def _setting(config: Any, name: str, default: Any) -> Any:
    value = _get(config, name, None)
    return default if value is None else value
