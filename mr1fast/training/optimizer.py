"""AdamW with the learning rate's schedule, clipping, and float32 weights behind a bfloat16 model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def learning_rate_at(step: int, *, peak: float, max_steps: int, warmup_steps: int) -> float:
    """The rate of the update after `step` finished ones: a linear rise, then a linear fall to 0, like TRL's default."""
    rise = (step + 1) / (warmup_steps + 1)
    fall = (max_steps - step) / max(max_steps - warmup_steps, 1)
    return peak * min(rise, fall, 1.0)


class Optimizer:
    """AdamW without weight decay (as TRL and R1-V run it) on float32 copies of weights of lower precision.

    At a learning rate of 1e-6 a bfloat16 weight would never move: it has 8 bits, and the update is below the last one.
    """

    def __init__(self, weights: Iterable[nn.Parameter], *, max_grad_norm: float):
        self.max_grad_norm = max_grad_norm
        self.weights = list(weights)
        self.masters = [w if w.dtype == torch.float32 else w.detach().float() for w in self.weights]
        self.adamw = torch.optim.AdamW(self.masters, weight_decay=0.0, fused=True)

    def step(self, learning_rate: float) -> float:
        """Update once from the gradients, which are then cleared. Returns their norm before clipping.

        If the norm is not finite, nothing is updated.
        """
        for weight, master in zip(self.weights, self.masters):
            if master is not weight:
                master.grad = None if weight.grad is None else weight.grad.float()
        norm = nn.utils.clip_grad_norm_(self.masters, self.max_grad_norm).item()
        if math.isfinite(norm):
            for group in self.adamw.param_groups:
                group["lr"] = learning_rate
            self.adamw.step()
            with torch.no_grad():
                for weight, master in zip(self.weights, self.masters):
                    if master is not weight:
                        weight.copy_(master)
        self.zero_grad()
        return norm

    def zero_grad(self) -> None:
        for tensor in (*self.weights, *self.masters):
            tensor.grad = None

    def state_dict(self) -> dict[str, Any]:
        """masters: None for a weight that is its own float32 copy, which the checkpoint holds as part of the model."""
        masters = [None if master is weight else master for weight, master in zip(self.weights, self.masters)]
        return {"adamw": self.adamw.state_dict(), "masters": masters}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The weights, too, become those of the state, whatever precision they had when it was saved."""
        self.adamw.load_state_dict(state["adamw"])
        with torch.no_grad():
            for weight, master, saved in zip(self.weights, self.masters, state["masters"], strict=True):
                if saved is not None:
                    master.copy_(saved)
                    weight.copy_(master)
