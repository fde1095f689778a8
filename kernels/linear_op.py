"""The autograd Functions and registered ops over linear.py: gradients for hidden states, weight and bias.

The one pass computes them in forward and hands them over in backward. Under torch.compile the `torch` backend has no
registered op (it needs autograd inside) and keeps the logits: Inductor fuses the reference by itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.library import custom_op

from mr1fast.kernels import autograd, dispatch, linear, reference
from mr1fast.kernels.autograd import LossOutputs, differentiable_once, new_link
from mr1fast.kernels.linear import Found, How, Needed
from mr1fast.kernels.ops import CALL_SCHEMA, LOGIT_MAP, unflat
from mr1fast.kernels.reference import LogitMap, LossBatch, LossSpec, flat


def grpo(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    batch: LossBatch,
    spec: LossSpec,
    *,
    reduction: str,
    chunk_bytes: int | None,
    backend: str,
) -> LossOutputs:
    """The loss and the per-token outputs; only the loss is differentiable."""
    dtype = gemm_dtype(hidden)
    backend = _resolve(backend, hidden, weight, dtype)
    if backend == "torch" and torch.compiler.is_compiling():
        logits = _logits(hidden, weight, bias, batch.mask, dtype)
        return autograd.grpo(logits, batch, spec, reduction=reduction, inplace=False, backend=backend)
    needed = _needed(hidden, weight, bias)
    if not autograd.one_pass(spec, reduction, dtype, any(needed)):
        logps, entropies = token_logprobs(
            hidden,
            weight,
            bias,
            batch.ids,
            batch.mask,
            LogitMap.of(batch, spec),
            chunk_bytes=chunk_bytes,
            backend=backend,
        )
        return autograd.objective(logps, entropies, batch, spec, reduction)
    args = (hidden, weight, bias, batch, spec, How(backend, dtype, chunk_bytes), needed)
    loss, *per_token = (_OnePass.apply if any(needed) else _grpo)(*args)[:6]
    logps, entropies, kl, is_low, is_high = per_token
    return loss, logps, entropies, None if batch.ref_logps is None else kl, is_low, is_high


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    mask: Tensor | None,
    logit_map: LogitMap,
    *,
    chunk_bytes: int | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(logps, entropies), both [B, L] and differentiable."""
    dtype = gemm_dtype(hidden)
    backend = _resolve(backend, hidden, weight, dtype)
    if backend == "torch" and torch.compiler.is_compiling():
        return reference.score(_logits(hidden, weight, bias, mask, dtype), ids, mask, logit_map)
    args = (hidden, weight, bias, ids, mask, logit_map, How(backend, dtype, chunk_bytes))
    needed = _needed(hidden, weight, bias)
    logps, entropies, *_ = _Score.apply(*args, needed) if any(needed) else _score(*args)
    return logps, entropies


def gemm_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of the GEMMs: autocast's if that is on; as everywhere, autocast leaves float64 alone."""
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(hidden.device.type)
    return hidden.dtype


def _resolve(backend: str, hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> str:
    return dispatch.resolve(backend, hidden.new_empty((1, 0, weight.shape[0]), dtype=dtype))


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    if mask is not None:  # inf or NaN in a masked row would reach the weight's gradient as 0 * inf
        hidden = torch.where(mask[..., None], hidden, 0)
    return nn.functional.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def _needed(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[bool, bool, bool]:
    enabled = torch.is_grad_enabled()
    with_bias = bias is not None and bias.requires_grad
    return enabled and hidden.requires_grad, enabled and weight.requires_grad, enabled and with_bias


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        batch: LossBatch,
        spec: LossSpec,
        how: How,
        needed: Needed,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.needed, ctx.handed_on = needed, False
        *outputs, dhidden, dweight, dbias = _grpo(hidden, weight, bias, batch, spec, how, needed)
        ctx.mark_non_differentiable(*outputs[1:])
        link = new_link(hidden)
        ctx.save_for_backward(dhidden, dweight, dbias, link)
        return *outputs, link

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
        gradients = [g if needed else None for g, needed in zip(autograd.hand_on(ctx, grad_loss), ctx.needed)]
        return *gradients, None, None, None, None


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        mask: Tensor | None,
        logit_map: LogitMap,
        how: How,
        needed: Needed,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.temperature, ctx.softcap, temperatures = logit_map
        ctx.how, ctx.needed = how, needed
        logps, entropies, lse = _score(hidden, weight, bias, ids, mask, logit_map, how)
        link = new_link(hidden)
        ctx.save_for_backward(hidden, weight, bias, ids, mask, lse, entropies, temperatures, link)
        ctx.mark_non_differentiable(lse)
        return logps, entropies, lse, link

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_logps: Tensor | None, grad_entropies: Tensor | None, *_: Any) -> tuple[Any, ...]:
        *saved, temperatures, _link = ctx.saved_tensors  # saved: hidden, weight, bias, ids, mask, lse, entropies
        if grad_logps is None:
            grad_logps = torch.zeros_like(saved[-1])
        logit_map = LogitMap(ctx.temperature, ctx.softcap, temperatures)
        args = (*saved, grad_logps, grad_entropies, logit_map, ctx.how, ctx.needed)
        gradients = [found if needed else None for found, needed in zip(_score_backward(*args), ctx.needed)]
        return *gradients, None, None, None, None, None


# ---- registered ops -------------------------------------------------------------------------------------------------

_HEAD = "Tensor hidden, Tensor weight, Tensor? bias"
_HOW = "str backend, ScalarType dtype, int? chunk_bytes"
_NEEDED = "bool needs_hidden, bool needs_weight, bool needs_bias"


def _tensors(found: Found, like: Tensor) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if gradient is None else gradient for gradient in found)


def _fake_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: Needed) -> tuple[Tensor, ...]:
    pairs = zip((hidden, weight, bias), needed)
    return tuple(t.new_empty(t.shape) if t is not None and need else hidden.new_empty(0) for t, need in pairs)


def _run_grpo(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    batch: LossBatch,
    spec: LossSpec,
    how: How,
    needed: Needed,
) -> tuple[Tensor, ...]:
    # The dtype has been decided; autocast would decide again inside.
    with torch.autocast(hidden.device.type, enabled=False):
        outputs, gradients = linear.grpo(hidden, weight, bias, batch, spec, how, needed)
    return *(hidden.new_empty(0) if t is None else t for t in outputs), *_tensors(gradients, hidden)


def _grpo_arguments(args: tuple[Any, ...]) -> tuple[LossBatch, LossSpec, How, Needed]:
    """The batch, settings and options from the op's arguments, which follow the head."""
    *options, backend, dtype, chunk_bytes, needs_hidden, needs_weight, needs_bias = args
    return *unflat(options), How(backend, dtype, chunk_bytes), (needs_hidden, needs_weight, needs_bias)


@custom_op(
    "mr1fast::linear_grpo_loss",
    mutates_args=(),
    schema=f"({_HEAD}, {CALL_SCHEMA}, {_HOW}, {_NEEDED}) -> ({', '.join(['Tensor'] * 9)})",
)
def linear_grpo_op(hidden: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    """(loss, logps, entropies, kl or empty, is_low, is_high, dhidden, dweight, dbias, each or empty)."""
    return _run_grpo(hidden, weight, bias, *_grpo_arguments(args))


@linear_grpo_op.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    values = hidden.new_empty(hidden.shape[:2], dtype=torch.float32)
    flags = hidden.new_empty(hidden.shape[:2], dtype=torch.bool)
    batch, _, _, needed = _grpo_arguments(args)
    kl = values.new_empty(0) if batch.ref_logps is None else torch.empty_like(values)
    outputs = (values.new_empty(()), values, torch.empty_like(values), kl, flags, torch.empty_like(flags))
    return *outputs, *_fake_gradients(hidden, weight, bias, needed)


def _run_score(hidden: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(hidden.device.type, enabled=False):
        return linear.score(hidden, *args)


@custom_op(
    "mr1fast::linear_score",
    mutates_args=(),
    schema=f"({_HEAD}, Tensor ids, Tensor? mask, {LOGIT_MAP}, {_HOW}) -> (Tensor, Tensor, Tensor)",
)
def linear_score_op(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(logps, entropies, lse), float32 [B, L]."""
    *tensors, temperature, softcap, temperatures, backend, dtype, chunk_bytes = args
    return _run_score(*tensors, LogitMap(temperature, softcap, temperatures), How(backend, dtype, chunk_bytes))


@linear_score_op.register_fake
def _(hidden: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    values = hidden.new_empty(hidden.shape[:2], dtype=torch.float32)
    return values, torch.empty_like(values), torch.empty_like(values)


def _run_score_backward(hidden: Tensor, *args: Any) -> tuple[Tensor, ...]:
    with torch.autocast(hidden.device.type, enabled=False):
        return _tensors(linear.score_backward(hidden, *args), hidden)


@custom_op(
    "mr1fast::linear_score_backward",
    mutates_args=(),
    schema=(
        f"({_HEAD}, Tensor ids, Tensor? mask, Tensor lse, Tensor entropies, Tensor grad_logps, Tensor? grad_entropies, "
        f"{LOGIT_MAP}, {_HOW}, {_NEEDED}) -> (Tensor, Tensor, Tensor)"
    ),
)
def linear_score_backward_op(*args: Any) -> tuple[Tensor, ...]:
    """(dhidden, dweight, dbias), each or empty."""
    *scored, temperature, softcap, temperatures, backend, dtype, chunk_bytes = args[:-3]
    how = How(backend, dtype, chunk_bytes)
    return _run_score_backward(*scored, LogitMap(temperature, softcap, temperatures), how, args[-3:])


@linear_score_backward_op.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    return _fake_gradients(hidden, weight, bias, args[-3:])


# The reference needs autograd, which a registered op switches off; so it is called directly.


def _grpo(*args: Any) -> tuple[Tensor, ...]:
    *head, batch, spec, how, needed = args
    if how.backend == "torch":
        return _run_grpo(*args)
    outputs: tuple[Tensor, ...] = linear_grpo_op(*head, *flat(batch, spec), *how, *needed)
    return outputs


def _score(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, mask: Tensor | None, logit_map: LogitMap, how: How
) -> tuple[Tensor, Tensor, Tensor]:
    args = (hidden, weight, bias, ids, mask)
    return _run_score(*args, logit_map, how) if how.backend == "torch" else linear_score_op(*args, *logit_map, *how)


def _score_backward(*args: Any) -> tuple[Tensor, ...]:
    *scored, logit_map, how, needed = args
    if how.backend == "torch":
        return _run_score_backward(*args)
    found: tuple[Tensor, ...] = linear_score_backward_op(*scored, *logit_map, *how, *needed)
    return found
