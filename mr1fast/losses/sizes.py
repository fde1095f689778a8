"""The loss head without its kernels, on tensors that have a shape and no numbers; what it allocates is the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from mr1fast.kernels import dispatch, linear, linear_op
from mr1fast.kernels.reference import LossBatch, LossSpec

# The registered ops hide what they allocate, and these functions are what they run.
BEHIND_OPS: dict[Any, Callable[..., Any]] = {
    torch.ops.mr1fast.linear_grpo_loss.default: linear_op.linear_grpo_op._init_fn,
    torch.ops.mr1fast.linear_score.default: linear_op.linear_score_op._init_fn,
    torch.ops.mr1fast.linear_score_backward.default: linear_op.linear_score_backward_op._init_fn,
}
# The namespace of the C++ ops, which work in place and return nothing.
IN_PLACE = "mr1fast_native"


def _grpo_forward(logits: Tensor, batch: LossBatch, spec: LossSpec, grad: Tensor | None) -> Any:
    """See `dispatch.Backend`; every row has a gradient."""
    flags = [torch.ones(batch.ids.shape, dtype=torch.bool) for _ in range(2)]
    loss, logps, entropies, kl, coef = (torch.ones(batch.ids.shape) for _ in range(5))
    return torch.ones(()), loss, logps, entropies, None if batch.ref_logps is None else kl, *flags, coef


def _score_forward(logits: Tensor, ids: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ones(ids.shape), torch.ones(ids.shape), torch.ones(ids.shape)


_NO_KERNELS = dispatch.Backend("plan", lambda _: None, _grpo_forward, _score_forward, lambda *_: None)


@contextmanager
def loss_head_of(device: str) -> Iterator[None]:
    """The loss head without kernels, in blocks of the size that they have on a "cpu" or on "cuda"."""
    kind = "cpu" if device == "cpu" else "gpu"
    with (
        patch.object(dispatch, "BACKENDS", (_NO_KERNELS,)),
        patch.object(dispatch, "NAMES", (*dispatch.NAMES, _NO_KERNELS.name)),
        patch.object(linear, "CHUNK_BYTES", {"cpu": linear.CHUNK_BYTES[kind]}),
        patch.object(linear, "MIN_ROWS", {"cpu": linear.MIN_ROWS[kind]}),
    ):
        yield
