"""What the cases of `linear` work on: hidden states, the lm_head's weight, and a batch for the objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases_loss import BETA, loss_batch
from mr1fast import linear_token_logprobs
from mr1fast.kernels.reference import LossBatch


@dataclass
class Inputs:
    """hidden [B, L, H] and weight [V, H], leaves; `batch` for the peers' objective, `keywords` for ours."""

    hidden: Tensor
    weight: Tensor
    ids: Tensor  # [B, L]
    advantages: Tensor  # [B]
    keywords: dict[str, Any]
    batch: LossBatch
    mask: Tensor  # [B, L], all ones unless cases_packed.py sets it

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None


def make_inputs(B: int, L: int, H: int, V: int, dtype: torch.dtype, device: str) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    hidden = normal(B, L, H).to(dtype).requires_grad_()
    weight = normal(V, H).mul_(3 * H**-0.5).to(dtype).requires_grad_()
    ids = torch.randint(0, V, (B, L), generator=generator, device=device)
    advantages = normal(B)
    with torch.no_grad():
        logps = linear_token_logprobs(hidden, weight, ids)
    assert isinstance(logps, Tensor)
    keywords: dict[str, Any] = {
        "old_per_token_logps": logps + 0.1 * normal(B, L),
        "ref_per_token_logps": logps + 0.1 * normal(B, L),
        "beta": BETA,
    }
    batch = loss_batch(ids, advantages, keywords["old_per_token_logps"], keywords["ref_per_token_logps"])
    return Inputs(hidden, weight, ids, advantages, keywords, batch, torch.ones_like(ids, dtype=torch.bool))
