"""The autograd Functions over the backends, and the registered ops beneath them.

There are two ways through the loss head:

- one pass (token-level objective, scalar loss): forward writes the finished gradient, and backward passes it on;
- two passes (everything else): `token_logprobs` has an autograd rule, and the objective is ordinary torch on [B, L].
  What needs more than a token at a time (a BatchwiseSpec, a sequence-level ratio) has no other way.
  float16 logits take this way, too: a small gradient survives in float16 only if the loss scale is in it before it is
  rounded.

The ops they call are in ops.py.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from mr1fast.kernels import batchwise, dispatch, reference
from mr1fast.kernels.normalisers import token_count
from mr1fast.kernels.ops import (
    grpo_loss_inplace_op,
    grpo_loss_op,
    new_gradient,
    run_grpo,
    run_score_backward,
    scale_op,
    score_backward_inplace_op,
    score_backward_op,
    score_op,
)
from mr1fast.kernels.reference import BatchwiseSpec, LogitMap, LossBatch, LossSpec, flat

# (loss, logps, entropies, kl, is_low_clipped, is_high_clipped)
LossOutputs = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor, Tensor]


def grpo(
    logits: Tensor, batch: LossBatch, spec: LossSpec, *, reduction: str, inplace: bool, backend: str
) -> LossOutputs:
    """The loss and the per-token outputs; only the loss is differentiable."""
    backend = dispatch.resolve(backend, logits)
    _refuse_consumed(logits)
    differentiated = torch.is_grad_enabled() and logits.requires_grad
    if backend == "torch" or not one_pass(spec, reduction, logits.dtype, differentiated):
        return _two_passes(logits, batch, spec, reduction, inplace, backend)
    if not differentiated:
        if direct(logits):
            loss, *per_token = run_grpo(logits, batch, spec, backend, None)
        else:
            loss, *per_token = grpo_loss_op(logits, *flat(batch, spec), backend, False)[:-1]
    else:
        # A leaf cannot be marked dirty, and a view may not be where a Function has several outputs.
        mark_dirty = inplace and not (torch.compiler.is_compiling() or logits.is_leaf or logits._is_view())
        outputs = _OnePass.apply(logits, batch, spec, backend, inplace, mark_dirty)[:-1]
        loss, *per_token = outputs[1:] if mark_dirty else outputs
        if inplace and not torch.compiler.is_compiling():
            _mark_consumed(_owner(logits))
    logps, entropies, kl, is_low, is_high = per_token
    return loss, logps, entropies, None if batch.ref_logps is None else kl, is_low, is_high


def one_pass(spec: LossSpec, reduction: str, dtype: torch.dtype, differentiated: bool) -> bool:
    """Whether forward can compute the gradient (see above); dtype: of the logits."""
    if differentiated and dtype == torch.float16:
        return False
    if isinstance(spec, BatchwiseSpec):
        return False
    return reduction != "none" and spec.importance_sampling_level == "token"


def _two_passes(
    logits: Tensor, batch: LossBatch, spec: LossSpec, reduction: str, inplace: bool, backend: str
) -> LossOutputs:
    logps, entropies = token_logprobs(
        logits, batch.ids, batch.mask, LogitMap.of(batch, spec), inplace_backward=inplace, backend=backend
    )
    return objective(logps, entropies, batch, spec, reduction)


def objective(logps: Tensor, entropies: Tensor | None, batch: LossBatch, spec: LossSpec, reduction: str) -> LossOutputs:
    """The second of the two passes: ordinary torch on log-probabilities and entropies [B, L], both 0 where masked."""
    high = None
    if isinstance(spec, BatchwiseSpec) and spec.top_entropy_quantile < 1:
        assert entropies is not None
        high = batchwise.high_entropy(entropies, batch.mask, spec.top_entropy_quantile)
    loss, kl, is_low, is_high = reference.objective(logps, batch, spec, high)
    if reduction == "none":
        loss = loss * batch.token_weight
    elif high is None or entropies is None or batch.entropy_weight is None:
        loss = reference.aggregate(loss, entropies, batch)
    else:  # the bonus is that of the same tokens
        share = high.sum().clamp(min=1) / token_count(batch.ids, batch.mask) if reduction == "mean" else 1
        loss = reference.aggregate(loss, entropies * high, batch._replace(entropy_weight=batch.entropy_weight / share))
    entropies, kl = (None if tensor is None else tensor.detach() for tensor in (entropies, kl))
    return loss, logps.detach(), entropies, kl, is_low, is_high


def token_logprobs(
    logits: Tensor, ids: Tensor, mask: Tensor | None, logit_map: LogitMap, *, inplace_backward: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """(logps, entropies), both [B, L] and differentiable."""
    backend = dispatch.resolve(backend, logits)
    _refuse_consumed(logits)
    if backend == "torch":
        return reference.score(logits, ids, mask, logit_map)
    logps, entropies, *_ = _Score.apply(logits, ids, mask, logit_map, inplace_backward, backend)
    return logps, entropies


def direct(logits: Tensor) -> bool:
    """Whether nobody watches the registered ops; what they call is then called directly.

    With some twenty arguments, torch's Python around an op takes 0.2 ms, as long as the kernel for a million logits.
    """
    return (
        not torch.compiler.is_compiling()
        and type(logits) in (Tensor, torch.nn.Parameter)
        and _get_current_dispatch_mode() is None
    )


# ---- the autograd Functions -----------------------------------------------------------------------------------------


class _NoSecondDerivative(torch.autograd.Function):
    """Gradients, passed on as they are. Their own derivative raises before it gets to the link."""

    @staticmethod
    def forward(ctx: Any, link: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(gradient.view_as(gradient) for gradient in gradients)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise RuntimeError(
            "the gradient of a fused loss cannot be differentiated again (create_graph=True): mr1fast computes it in "
            "closed form; grpo_loss and token_logprobs from logits can be, with backend='torch'"
        )


def differentiable_once(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """Decorates an autograd Function's backward: to differentiate its result is an error, instead of silently wrong.

    torch's `once_differentiable` raises only where the incoming gradient needs a gradient, and that of a loss is 1. So
    the result is tied to the Function itself, and thereby to all that the Function was applied to, by a `new_link`: its
    last output and last saved tensor. (torch.compile refuses double backward by itself.)
    """

    @functools.wraps(backward)
    def once(ctx: Any, *incoming: Any) -> tuple[Any, ...]:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return backward(ctx, *incoming)
        *_, link = ctx.saved_tensors
        with torch.no_grad():
            results = backward(ctx, *incoming)
        found = [result for result in results if result is not None]
        guarded = iter(_NoSecondDerivative.apply(link, *found) if found else ())
        return tuple(None if result is None else next(guarded) for result in results)

    return once


def new_link(like: Tensor) -> Tensor:
    """For `differentiable_once`: an output without elements, which no caller sees, so that none can change it."""
    return like.new_empty(0)


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, batch: LossBatch, spec: LossSpec, backend: str, inplace: bool, mark_dirty: bool
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.mark_dirty_used, ctx.handed_on = mark_dirty, False
        if direct(logits):
            gradient = logits if inplace else new_gradient(logits)
            outputs = run_grpo(logits, batch, spec, backend, gradient)
            if inplace:
                torch.autograd.graph.increment_version(logits)
        elif inplace:
            outputs = grpo_loss_inplace_op(logits, *flat(batch, spec), backend)
            gradient = logits
        else:
            *outputs, gradient = grpo_loss_op(logits, *flat(batch, spec), backend, True)
        ctx.mark_non_differentiable(*outputs[1:])
        if mark_dirty:
            ctx.mark_dirty(logits)
            outputs = (logits, *outputs)
        link = new_link(logits)
        ctx.save_for_backward(gradient, link)
        return *outputs, link

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        if ctx.mark_dirty_used:
            if grad_outputs[0] is not None:
                raise RuntimeError(
                    "grpo_loss(inplace=True) replaced these logits by their gradient, but something computed from them "
                    "afterwards needs their gradient too; pass inplace=False, or use the logits before the loss only"
                )
            grad_outputs = grad_outputs[1:]
        (gradient,) = hand_on(ctx, grad_outputs[0])
        return gradient, None, None, None, None, None


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        ids: Tensor,
        mask: Tensor | None,
        logit_map: LogitMap,
        inplace_backward: bool,
        backend: str,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        if direct(logits):
            logps, entropies, lse = dispatch.find(backend).score_forward(logits, ids, mask, logit_map)
        else:
            logps, entropies, lse = score_op(logits, ids, mask, *logit_map, backend)
        link = new_link(logits)
        ctx.temperature, ctx.softcap, temperatures = logit_map
        ctx.save_for_backward(logits, ids, mask, lse, entropies, temperatures, link)
        ctx.inplace_backward, ctx.backend = inplace_backward, backend
        ctx.mark_non_differentiable(lse)
        # save_for_backward returns another object later, on which a mark would be lost.
        ctx.owner = None if torch.compiler.is_compiling() else weakref.ref(_owner(logits))
        return logps, entropies, lse, link

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_logps: Tensor | None, grad_entropies: Tensor | None, *_: Any) -> tuple[Any, ...]:
        logits, ids, mask, lse, entropies, temperatures, _link = ctx.saved_tensors
        if grad_logps is None:
            grad_logps = torch.zeros_like(lse)
        if grad_entropies is not None:
            grad_entropies = grad_entropies.contiguous()
        gradients = (grad_logps.contiguous(), grad_entropies)
        args = (ids, mask, lse, entropies, *gradients, ctx.temperature, ctx.softcap, temperatures, ctx.backend)
        if ctx.inplace_backward:
            gradient = logits = logits.detach()
        if direct(logits):
            if not ctx.inplace_backward:
                gradient = new_gradient(logits)
            run_score_backward(logits, args, gradient)
            if ctx.inplace_backward:
                torch.autograd.graph.increment_version(gradient)
        elif ctx.inplace_backward:
            score_backward_inplace_op(logits, *args)
        else:
            gradient = score_backward_op(logits, *args)
        if ctx.inplace_backward and ctx.owner is not None and (owner := ctx.owner()) is not None:
            _mark_consumed(owner)
        return gradient, None, None, None, None, None


def hand_on(ctx: Any, factor: Tensor | None) -> list[Tensor | None]:
    """Multiply the saved gradients by the loss's own gradient (0-d): in place at first, later in new memory."""
    *gradients, _link = ctx.saved_tensors
    if factor is None:
        return [None for _ in gradients]
    if torch.compiler.is_compiling():
        return [_scaled(gradient, factor) for gradient in gradients]
    again, ctx.handed_on = ctx.handed_on, True
    return [gradient * factor if again else _scaled(gradient, factor) for gradient in gradients]


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    # On a CPU, outside of a compiled graph, reading the factor is free. A factor of 1 leaves even the version as it is,
    # so that backward can run twice; with any other, a second backward raises: the saved gradient has changed.
    if torch.compiler.is_compiling() or gradient.is_cuda or factor.item() != 1:
        scale_op(gradient, factor)
    return gradient


# ---- misuse of inplace ----------------------------------------------------------------------------------------------


_CONSUMED_AT = "_mr1fast_consumed_at_version"


def _owner(logits: Tensor) -> Tensor:
    return logits if logits._base is None else logits._base


def _mark_consumed(owner: Tensor) -> None:
    owner.__dict__[_CONSUMED_AT] = owner._version


def _refuse_consumed(logits: Tensor) -> None:
    """Raise if these logits still hold the gradient that an earlier in-place call wrote over them."""
    if not (torch.compiler.is_compiling() or logits.is_inference()):  # those have no version, and no gradient either
        owner = _owner(logits)
        if owner.__dict__.get(_CONSUMED_AT) == owner._version:
            raise RuntimeError(
                "these logits were already consumed by an in-place call and hold a gradient now; compute them again, "
                "make the earlier call with inplace=False (inplace_backward=False), or let activation checkpointing "
                "recompute the lm_head together with the loss"
            )
