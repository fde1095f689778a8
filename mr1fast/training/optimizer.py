"""AdamW with clipping, and float32 weights behind a bfloat16 model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Of float32 gradients at a time; a weight with more has its own alone.
CHUNK_BYTES = 64 * 2**20


class Optimizer:
    """AdamW without weight decay (as TRL and R1-V run it) on float32 copies of weights of lower precision.

    At a learning rate of 1e-6 a bfloat16 weight would never move: it has 8 bits, the update is below the last of them.
    Such a weight takes 16 bytes: 2, and 2 of its gradient, 4 of the copy, 8 of AdamW's moments. The float32 gradient
    that AdamW wants would be 4 more; it is made for a few weights at a time.
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
        norm = self.norm()
        if norm.isfinite():
            for group in self.adamw.param_groups:
                group["lr"] = learning_rate
            self._update(norm)
        self.zero_grad()
        return norm.item()

    def norm(self) -> Tensor:
        """Of all gradients together, 0-d float32; in the sums, too, whatever their own precision."""
        gradients = [weight.grad for weight in self.weights if weight.grad is not None]
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())

    @torch.no_grad()
    def _update(self, norm: Tensor) -> None:
        """AdamW's step, clipped by this norm, in chunks: of all its weights it moves those that have a gradient."""
        gradients = [weight.grad for weight in self.weights]
        self.zero_grad()
        for chunk in _chunks(self.masters):
            for i in chunk:
                gradient, gradients[i] = gradients[i], None
                self.masters[i].grad = None if gradient is None else gradient.float()
                del gradient
            masters = [self.masters[i] for i in chunk]
            nn.utils.clip_grads_with_norm_(masters, self.max_grad_norm, norm)
            self.adamw.step()
            for i in chunk:
                self.masters[i].grad = None
                if self.masters[i] is not self.weights[i]:
                    self.weights[i].copy_(self.masters[i])

    def zero_grad(self) -> None:
        for weight in self.weights:
            weight.grad = None

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


def _chunks(masters: list[Tensor]) -> Iterator[list[int]]:
    """The places of these tensors, in order, as many at a time as have up to CHUNK_BYTES together."""
    chunk: list[int] = []
    size = 0
    for i, master in enumerate(masters):
        if chunk and size + master.nbytes > CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(i)
        size += master.nbytes
    if chunk:
        yield chunk
