"""The registered ops of the loss from logits: to torch.compile each is one node, whose shapes it gets from a fake op.

An op that overwrites its argument is declared as a mutation, so that autograd and torch.compile know about it. The
autograd rules are in autograd.py, the ops that start from hidden states in linear_op.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.library import custom_op

from mr1fast.kernels import dispatch, triton_backend
from mr1fast.kernels.reference import LogitMap, LossBatch, LossSpec

# A registered op takes tensors and plain values: a batch and a spec go in field by field, as `flat` lists them.
_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", int: "int", float: "float", bool: "bool", str: "str"}
_FIELDS = get_type_hints(LossBatch) | get_type_hints(LossSpec)
CALL_SCHEMA = ", ".join(f"{_TYPES[kind]} {name}" for name, kind in _FIELDS.items())
_BATCH_SIZE = len(LossBatch._fields)
# A tuple, not Tensor[]: an op that mutates an argument and returns a list cannot be functionalised by torch.compile.
_OUTPUTS = "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor"


def unflat(args: Sequence[Any]) -> tuple[LossBatch, LossSpec]:
    """What `flat` made of a batch and a spec."""
    return LossBatch(*args[:_BATCH_SIZE]), LossSpec(*args[_BATCH_SIZE:])


def run_grpo(
    logits: Tensor, batch: LossBatch, spec: LossSpec, backend: str, gradient: Tensor | None
) -> tuple[Tensor, ...]:
    outputs = dispatch.find(backend).grpo_forward(logits, batch, spec, gradient)
    loss, _, logps, entropies, kl, is_low, is_high, _ = outputs
    return loss, logps, entropies, logps.new_empty(0) if kl is None else kl, is_low, is_high


def _fake_grpo(logits: Tensor, batch: LossBatch) -> tuple[Tensor, ...]:
    values = logits.new_empty(logits.shape[:2], dtype=torch.float32)
    flags = logits.new_empty(logits.shape[:2], dtype=torch.bool)
    kl = values.new_empty(0) if batch.ref_logps is None else torch.empty_like(values)
    return values.new_empty(()), values, torch.empty_like(values), kl, flags, torch.empty_like(flags)


def new_gradient(logits: Tensor) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@custom_op(
    "mr1fast::grpo_loss",
    mutates_args=(),
    schema=f"(Tensor logits, {CALL_SCHEMA}, str backend, bool need_gradient) -> ({_OUTPUTS}, Tensor)",
)
def grpo_loss_op(logits: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """(loss, logps, entropies, kl or empty, is_low, is_high, dloss/dlogits or empty)."""
    *options, backend, need_gradient = args
    gradient = new_gradient(logits) if need_gradient else None
    outputs = run_grpo(logits, *unflat(options), backend, gradient)
    return *outputs, logits.new_empty(0) if gradient is None else gradient


@grpo_loss_op.register_fake
def _(logits: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *options, _, need_gradient = args
    return *_fake_grpo(logits, unflat(options)[0]), new_gradient(logits) if need_gradient else logits.new_empty(0)


@custom_op(
    "mr1fast::grpo_loss_",
    mutates_args=("logits",),
    schema=f"(Tensor(a!) logits, {CALL_SCHEMA}, str backend) -> ({_OUTPUTS})",
)
def grpo_loss_inplace_op(logits: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """(loss, logps, entropies, kl or empty, is_low, is_high); dloss/dlogits overwrites the logits."""
    return run_grpo(logits, *unflat(args[:-1]), args[-1], logits)


@grpo_loss_inplace_op.register_fake
def _(logits: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return _fake_grpo(logits, unflat(args[:-1])[0])


# A LogitMap, field by field.
LOGIT_MAP = "float temperature, float softcap, Tensor? temperatures"


@custom_op(
    "mr1fast::score",
    mutates_args=(),
    schema=f"(Tensor logits, Tensor ids, Tensor? mask, {LOGIT_MAP}, str backend) -> (Tensor, Tensor, Tensor)",
)
def score_op(logits: Tensor, ids: Tensor, mask: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(logps, entropies, lse), float32 [B, L]."""
    *logit_map, backend = args
    return dispatch.find(backend).score_forward(logits, ids, mask, LogitMap(*logit_map))


@score_op.register_fake
def _(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    values = logits.new_empty(logits.shape[:2], dtype=torch.float32)
    return values, torch.empty_like(values), torch.empty_like(values)


_SCORED = "Tensor ids, Tensor? mask, Tensor lse, Tensor entropies, Tensor grad_logps, Tensor? grad_entropies"


@custom_op(
    "mr1fast::score_backward",
    mutates_args=(),
    schema=f"(Tensor logits, {_SCORED}, {LOGIT_MAP}, str backend) -> Tensor",
)
def score_backward_op(logits: Tensor, *args: Any) -> Tensor:
    """dlogits of `score`, in a new buffer."""
    gradient = new_gradient(logits)
    run_score_backward(logits, args, gradient)
    return gradient


def run_score_backward(logits: Tensor, args: tuple[Any, ...], gradient: Tensor) -> None:
    *scored, temperature, softcap, temperatures, backend = args
    dispatch.find(backend).score_backward(logits, *scored, LogitMap(temperature, softcap, temperatures), gradient)


@score_backward_op.register_fake
def _(logits: Tensor, *args: Any) -> Tensor:
    return new_gradient(logits)


@custom_op(
    "mr1fast::score_backward_",
    mutates_args=("logits",),
    schema=f"(Tensor(a!) logits, {_SCORED}, {LOGIT_MAP}, str backend) -> ()",
)
def score_backward_inplace_op(logits: Tensor, *args: Any) -> None:
    """dlogits of `score`, written over the logits."""
    run_score_backward(logits, args, logits)


@score_backward_inplace_op.register_fake
def _(logits: Tensor, *args: Any) -> None:
    pass


@custom_op("mr1fast::scale_", mutates_args=("gradient",))
def scale_op(gradient: Tensor, factor: Tensor) -> None:
    """gradient [B, L, V], [V, H] or [V] *= factor (0-d); memory is not touched if the factor is 1."""
    if gradient.is_cuda and triton_backend.why_not(gradient) is None:
        from mr1fast.kernels import triton_score

        # A weight's is contiguous: as H rows of V elements it takes H blocks on the device and not V.
        rows = gradient if gradient.dim() == 3 else gradient.view(1, -1, gradient.shape[0])
        triton_score.scale_unless_one(rows, factor)
    elif factor.item() != 1:
        gradient.mul_(factor)  # computed in float32 and rounded once; a 0-d factor does not change the dtype


@scale_op.register_fake
def _(gradient: Tensor, factor: Tensor) -> None:
    pass
