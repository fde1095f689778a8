"""The metrics of a loss of ours under TRL's names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from trl.trainer import utils as trl_utils

from mr1fast.kernels import normalisers
from mr1fast.kernels.batchwise import high_entropy
from mr1fast.kernels.loss_types import normalised_by
from mr1fast.losses.logits import GRPOLossOutput

# Whose losses TRL counts in tokens of a whole generation batch, over all processes.
BY_ITEMS = normalised_by(normalisers.batch_tokens)


def log_loss(
    trainer: Any, mode: str, out: GRPOLossOutput, mask: Tensor, entropy_coef: float, scale: float, steps: int
) -> None:
    """TRL's metrics, over all processes, with two transfers instead of one each."""
    assert out.entropies is not None
    metrics = trainer._metrics[mode]
    flags = {"low_mean": out.is_low_clipped, "high_mean": out.is_high_clipped}
    flags["region_mean"] = out.is_low_clipped | out.is_high_clipped
    tokens, completions = mask.sum().float(), torch.tensor(float(len(mask)), device=mask.device)
    sums = {"entropy": out.entropies.sum()}
    if out.kl is not None:
        sums["kl"] = out.kl.sum()
    for name, flag in flags.items():
        sums[name] = (flag.any(1) if out.clipped_per_completion else flag).sum().float()
    totals = trainer.accelerator.reduce(torch.stack([tokens, completions, *sums.values()]), reduction="sum").tolist()
    token_count, completion_count = max(totals[0], 1.0), max(totals[1], 1.0)
    values = dict(zip(sums, totals[2:]))
    flag_count = completion_count if out.clipped_per_completion else token_count
    if "kl" in values:
        metrics["kl"].append(values["kl"] / token_count)
    metrics["entropy"].append(values["entropy"] / token_count)
    if trainer.loss_type == "cispo":
        metrics["cispo_clip_ratio"].append(values["high_mean"] / flag_count)
    elif trainer.loss_type != "sapo":
        for name in flags:
            metrics[f"clip_ratio/{name}"].append(values[name] / flag_count)
        pair = torch.stack([out.is_low_clipped, out.is_high_clipped], dim=-1)  # [B, L, 2]
        if out.clipped_per_completion:
            rates = pair.any(1).float()
        else:
            rates = pair.sum(1) / mask.sum(1, keepdim=True)  # NaN for a completion without tokens
        rates = trainer.accelerator.gather(rates)
        metrics["clip_ratio/low_min"].append(trl_utils.nanmin(rates[:, 0]).item())
        metrics["clip_ratio/high_max"].append(trl_utils.nanmax(rates[:, 1]).item())
    if trainer._entropy_bonus_enabled:
        acts = mask.bool()
        if trainer.top_entropy_quantile < 1:
            acts = high_entropy(out.entropies, acts, trainer.top_entropy_quantile)
        local_entropy = out.entropies[acts].sum() / acts.sum().clamp(min=1)
        policy_loss = out.loss.detach() * scale + entropy_coef * local_entropy
        if trainer.loss_type not in BY_ITEMS:
            policy_loss = policy_loss * steps
        metrics["policy_loss"].append(trainer.accelerator.gather(policy_loss).nanmean().item())
        if mode == "train" and trainer.accelerator.sync_gradients:
            metrics["entropy_coef"].append(trainer.entropy_coef)
