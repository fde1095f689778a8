"""From rewards to group-relative advantages (DeepSeekMath, arXiv 2402.03300, section 4.1.2), in plain PyTorch.

As with the objective (reference.py), this is the definition; `triton_objective.py` and `csrc/token_loss.h` follow it.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE_REWARDS = ("group", "batch", "none")
EPS = 1e-4  # added to the standard deviation, as TRL does


def group_advantages(rewards: Tensor, num_generations: int, scale_rewards: str, eps: float = EPS) -> Tensor:
    """(R - mean of its group) / (std + eps), std unbiased, over the group, the batch or not at all; NaN is absent.

    Equal rewards have advantages of exactly 0. If rounding left R - mean at 1e-8 instead, dividing by eps would make it
    1e-4, and AdamW, which only looks at a gradient's direction, would take a step of full length.
    """
    groups = rewards.double().view(-1, num_generations)
    centred, count = _centred(groups)
    if scale_rewards != "none":
        spread, n = (centred, count) if scale_rewards == "group" else _centred(groups.view(1, -1))
        std = (spread.square().sum(1, keepdim=True) / (n - 1).clamp(min=1)).sqrt()
        centred = centred / (std + eps)
    return centred.flatten().to(torch.promote_types(rewards.dtype, torch.float32))


def _centred(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards [n, m] minus the mean of their row, 0 where NaN; and the number in each row that are not NaN, [n, 1].

    What is averaged are the differences from one reward of the row. For equal rewards they are 0, and so is their mean;
    the mean of the rewards themselves need not equal them: (0.1 + 0.1 + 0.1) / 3 > 0.1, in float64 too.
    """
    if rewards.numel() == 0:
        return rewards, rewards.new_zeros(len(rewards), 1)
    present = ~rewards.isnan()
    first = rewards.gather(1, present.int().argmax(1, keepdim=True))
    count = present.sum(1, keepdim=True)
    beyond_first = torch.where(present, rewards - first, 0)
    mean = beyond_first.sum(1, keepdim=True) / count.clamp(min=1)
    return torch.where(present, beyond_first - mean, 0), count
