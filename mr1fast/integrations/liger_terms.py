"""What Liger's two GRPO losses have in common beside ours: its normalisers, metrics and refusals, and vespo."""

from __future__ import annotations

import torch
from torch import Tensor

from mr1fast.checks import choice
from mr1fast.integrations import SHARED_LOSS_TYPES
from mr1fast.losses.logits import GRPOLossOutput
from mr1fast.losses.vespo import vespo_weights

# loss_type, old log-probabilities and epsilon_high: CISPO, whose own ratio is 1 then.
VESPO_AS = ("cispo", None, 1.0)


def vespo_column(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    ratio: Tensor | None,
    k_and_lambda: tuple[float, float, float, float],
) -> Tensor:
    k_pos, lambda_pos, k_neg, lambda_neg = k_and_lambda
    weights = vespo_weights(
        logps,
        old_logps,
        advantages,
        completion_mask=mask,
        importance_sampling_ratio=ratio,
        k_pos=k_pos,
        lambda_pos=lambda_pos,
        k_neg=k_neg,
        lambda_neg=lambda_neg,
    )
    return weights[:, None]


def padding_weight(mask: Tensor) -> Tensor:
    """[B, L], the length of a completion over the padded one, by which Liger's luspo multiplies TRL's."""
    return (mask.sum(1, keepdim=True, dtype=torch.float32) / max(mask.shape[1], 1)).expand(mask.shape)


def refuse_unsupported(
    loss_type: str, importance_sampling_level: str, delta: float | None, use_bias_correction_kl: bool
) -> None:
    choice("loss_type", loss_type, (*SHARED_LOSS_TYPES, "vespo"))
    if loss_type in ("cispo", "sapo", "vespo"):
        if importance_sampling_level == "sequence":
            raise ValueError(
                f"Sequence-level importance sampling is not supported for loss_type={loss_type!r}. Use "
                "importance_sampling_level='token' instead."
            )
        if delta is not None:
            raise ValueError(f"delta (two-sided clipping) is not supported for loss_type={loss_type!r}.")
    if loss_type == "vespo" and use_bias_correction_kl:
        raise ValueError("use_bias_correction_kl must be False with loss_type='vespo', whose ratio is not the tokens'")


def per_completion(ratio: Tensor | None) -> Tensor | None:
    return ratio[:, None] if ratio is not None and ratio.dim() == 1 else ratio


def normaliser(loss_type: str, mask: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor | None:
    """Tokens per process, over all processes where no number is given: 0-d float32, at least 1."""
    if loss_type not in ("dapo", "cispo"):
        return None
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if num_items_in_batch is not None:
        items = torch.as_tensor(num_items_in_batch, dtype=torch.float32, device=mask.device)
    else:
        items = mask.sum(dtype=torch.float32)
        if distributed:
            torch.distributed.all_reduce(items)
    return (items / (torch.distributed.get_world_size() if distributed else 1)).clamp(min=1)


def loss_metrics(out: GRPOLossOutput, mask: Tensor) -> list[Tensor]:
    """[mean KL,] clip ratio over the unmasked tokens, also at sequence level (TRL: over completions)."""
    tokens = mask.sum(dtype=torch.float32).clamp(min=1)
    values = [out.is_low_clipped | out.is_high_clipped]
    return [value.sum() / tokens for value in ([] if out.kl is None else [out.kl]) + values]
