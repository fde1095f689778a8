"""The autograd Functions over the backends, and the registered ops beneath them.

Two ways through the same loss head:

- one pass (token-level objective, scalar loss): forward writes the finished gradient, backward hands it on;
- two passes (everything else): `token_logprobs` has an autograd rule, and the objective is ordinary torch on [B, L].

Every op that writes over its argument is declared as a mutation, so that autograd and torch.compile know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils._python_dispatch import _get_current_dispatch_mode

from mr1fast.kernels import dispatch, reference, triton_backend
from mr1fast.kernels.reference import LossBatch, LossSpec, flat

# (loss, logps, entropies, kl, is_low_clipped, is_high_clipped)
LossOutputs = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]


def grpo(
    logits: Tensor, batch: LossBatch, spec: LossSpec, *, reduction: str, inplace: bool, backend: str
) -> LossOutputs:
    """The loss and the per-token outputs; only the loss is differentiable."""
    backend = dispatch.resolve(backend, logits)
    if inplace:
        _refuse_consumed(logits)
    if backend == "torch" or reduction == "none" or spec.importance_sampling_level == "sequence":
        return _two_passes(logits, batch, spec, reduction, inplace, backend)
    if not (torch.is_grad_enabled() and logits.requires_grad):
        if _direct(logits):
            loss, *per_token = _run_grpo(logits, batch, spec, backend, None)
        else:
            loss, *per_token = grpo_loss_op(logits, *flat(batch), *flat(spec), backend, False)[:-1]
    else:
        # A leaf cannot be marked dirty, and a view may not be where a Function has several outputs.
        mark_dirty = inplace and not (torch.compiler.is_compiling() or logits.is_leaf or logits._is_view())
        outputs = _OnePass.apply(logits, batch, spec, backend, inplace, mark_dirty)
        loss, *per_token = outputs[1:] if mark_dirty else outputs
        if inplace:
            _mark_consumed(logits)
    logps, entropies, kl, is_low, is_high = per_token
    return loss, logps, entropies, None if batch.ref_logps is None else kl, is_low, is_high


def _two_passes(
    logits: Tensor, batch: LossBatch, spec: LossSpec, reduction: str, inplace: bool, backend: str
) -> LossOutputs:
    logps, entropies = token_logprobs(
        logits, batch.ids, batch.mask, spec.temperature, inplace_backward=inplace, backend=backend
    )
    return objective(logps, entropies, batch, spec, reduction)


def objective(logps: Tensor, entropies: Tensor, batch: LossBatch, spec: LossSpec, reduction: str) -> LossOutputs:
    """The second of the two passes: ordinary torch on log-probabilities and entropies [B, L]."""
    loss, kl, is_low, is_high = reference.objective(logps, batch, spec)
    if reduction == "mean":
        loss = reference.aggregate(loss, entropies, batch)
    return loss, logps.detach(), entropies.detach(), None if kl is None else kl.detach(), is_low, is_high


def token_logprobs(
    logits: Tensor, ids: Tensor, mask: Tensor | None, temperature: float, *, inplace_backward: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """(logps, entropies), both [B, L] and differentiable."""
    backend = dispatch.resolve(backend, logits)
    if backend == "torch":
        return reference.score(logits, ids, mask, temperature)
    if inplace_backward:
        _refuse_consumed(logits)
    logps, entropies, _ = _Score.apply(logits, ids, mask, temperature, inplace_backward, backend)
    return logps, entropies


def _direct(logits: Tensor) -> bool:
    """Whether nothing watches the registered ops: then what they call is called at once.

    With some twenty arguments the dispatcher's Python takes 0.2 ms, as long as the kernel takes for a million logits.
    """
    return (
        not torch.compiler.is_compiling()
        and type(logits) in (Tensor, torch.nn.Parameter)
        and _get_current_dispatch_mode() is None
    )


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, batch: LossBatch, spec: LossSpec, backend: str, inplace: bool, mark_dirty: bool):
        ctx.set_materialize_grads(False)
        ctx.mark_dirty_used = mark_dirty
        if _direct(logits):
            gradient = logits if inplace else _new_gradient(logits)
            outputs = _run_grpo(logits, batch, spec, backend, gradient)
            if inplace:
                torch.autograd.graph.increment_version(logits)
        elif inplace:
            outputs = grpo_loss_inplace_op(logits, *flat(batch), *flat(spec), backend)
            gradient = logits
        else:
            *outputs, gradient = grpo_loss_op(logits, *flat(batch), *flat(spec), backend, True)
        ctx.mark_non_differentiable(*outputs[1:])
        if mark_dirty:
            ctx.mark_dirty(logits)
            outputs = (logits, *outputs)
        ctx.save_for_backward(gradient)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *grad_outputs):
        if ctx.mark_dirty_used:
            if grad_outputs[0] is not None:
                raise RuntimeError(
                    "grpo_loss(inplace=True) replaced these logits by their gradient, but something computed from them "
                    "afterwards needs their gradient too; pass inplace=False, or use the logits before the loss only"
                )
            grad_outputs = grad_outputs[1:]
        (gradient,) = ctx.saved_tensors
        return None if grad_outputs[0] is None else scaled(gradient, grad_outputs[0]), None, None, None, None, None


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, ids, mask, temperature: float, inplace_backward: bool, backend: str):
        ctx.set_materialize_grads(False)
        logps, entropies, lse = score_op(logits, ids, mask, temperature, backend)
        ctx.save_for_backward(logits, ids, mask, lse, entropies)
        ctx.temperature, ctx.inplace_backward, ctx.backend = temperature, inplace_backward, backend
        ctx.mark_non_differentiable(lse)
        return logps, entropies, lse

    @staticmethod
    def backward(ctx, grad_logps, grad_entropies, _):
        logits, ids, mask, lse, entropies = ctx.saved_tensors
        if grad_logps is None:
            grad_logps = torch.zeros_like(lse)
        if grad_entropies is not None:
            grad_entropies = grad_entropies.contiguous()
        gradients = (grad_logps.contiguous(), grad_entropies)
        args = (ids, mask, lse, entropies, *gradients, ctx.temperature, ctx.backend)
        if ctx.inplace_backward:
            logits = logits.detach()
            score_backward_inplace_op(logits, *args)
            gradient = logits
        else:
            gradient = score_backward_op(logits, *args)
        return gradient, None, None, None, None, None


# ---- misuse of inplace ----------------------------------------------------------------------------------------------


_CONSUMED_AT = "_mr1fast_consumed_at_version"


def _owner(logits: Tensor) -> Tensor:
    return logits if logits._base is None else logits._base


def _mark_consumed(logits: Tensor) -> None:
    if not torch.compiler.is_compiling():
        owner = _owner(logits)
        owner.__dict__[_CONSUMED_AT] = owner._version


def _refuse_consumed(logits: Tensor) -> None:
    """Raise if this memory still holds the gradient an earlier in-place call wrote (used twice, or recomputed from)."""
    if not torch.compiler.is_compiling():
        owner = _owner(logits)
        if owner.__dict__.get(_CONSUMED_AT) == owner._version:
            raise RuntimeError(
                "these logits were already consumed by a call with inplace=True and hold a gradient now; pass "
                "inplace=False, or let activation checkpointing recompute the lm_head together with the loss"
            )


# ---- registered ops -------------------------------------------------------------------------------------------------

# The fields of LossBatch, then those of LossSpec, in order.
BATCH_SCHEMA = (
    "Tensor ids, Tensor token_weight, Tensor beta, Tensor? mask, Tensor? advantages, Tensor? rewards, "
    "int num_generations, str scale_rewards, Tensor? old_logps, Tensor? ref_logps, Tensor? is_ratio, "
    "Tensor? entropy_weight"
)
SPEC_SCHEMA = (
    "str loss_type, str importance_sampling_level, float epsilon_low, float epsilon_high, float? delta, "
    "bool use_bias_correction_kl, float sapo_temperature_pos, float sapo_temperature_neg, float temperature"
)
BATCH_SIZE = len(fields(LossBatch))
# A tuple, not Tensor[]: an op that mutates an argument and returns a list cannot be functionalised by torch.compile.
_OUTPUTS = "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor"


def unflat(args: Sequence[Any]) -> tuple[LossBatch, LossSpec]:
    """What `flat` made of a batch and a spec."""
    return LossBatch(*args[:BATCH_SIZE]), LossSpec(*args[BATCH_SIZE:])


def _run_grpo(
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


def _new_gradient(logits: Tensor) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@custom_op(
    "mr1fast::grpo_loss",
    mutates_args=(),
    schema=f"(Tensor logits, {BATCH_SCHEMA}, {SPEC_SCHEMA}, str backend, bool need_gradient) -> ({_OUTPUTS}, Tensor)",
)
def grpo_loss_op(logits: Tensor, *args) -> tuple[Tensor, ...]:
    """(loss, logps, entropies, kl or empty, is_low, is_high, dloss/dlogits or empty)."""
    *options, backend, need_gradient = args
    gradient = _new_gradient(logits) if need_gradient else None
    outputs = _run_grpo(logits, *unflat(options), backend, gradient)
    return *outputs, logits.new_empty(0) if gradient is None else gradient


@grpo_loss_op.register_fake
def _(logits: Tensor, *args) -> tuple[Tensor, ...]:
    *options, _, need_gradient = args
    return *_fake_grpo(logits, unflat(options)[0]), _new_gradient(logits) if need_gradient else logits.new_empty(0)


@custom_op(
    "mr1fast::grpo_loss_",
    mutates_args=("logits",),
    schema=f"(Tensor(a!) logits, {BATCH_SCHEMA}, {SPEC_SCHEMA}, str backend) -> ({_OUTPUTS})",
)
def grpo_loss_inplace_op(logits: Tensor, *args) -> tuple[Tensor, ...]:
    """(loss, logps, entropies, kl or empty, is_low, is_high); dloss/dlogits overwrites the logits."""
    return _run_grpo(logits, *unflat(args[:-1]), args[-1], logits)


@grpo_loss_inplace_op.register_fake
def _(logits: Tensor, *args) -> tuple[Tensor, ...]:
    return _fake_grpo(logits, unflat(args[:-1])[0])


@custom_op("mr1fast::score", mutates_args=())
def score_op(
    logits: Tensor, ids: Tensor, mask: Tensor | None, temperature: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(logps, entropies, lse), float32 [B, L]."""
    return dispatch.find(backend).score_forward(logits, ids, mask, temperature)


@score_op.register_fake
def _(logits, ids, mask, temperature, backend):
    values = logits.new_empty(logits.shape[:2], dtype=torch.float32)
    return values, torch.empty_like(values), torch.empty_like(values)


_SCORED = "Tensor ids, Tensor? mask, Tensor lse, Tensor entropies, Tensor grad_logps, Tensor? grad_entropies"


@custom_op(
    "mr1fast::score_backward",
    mutates_args=(),
    schema=f"(Tensor logits, {_SCORED}, float temperature, str backend) -> Tensor",
)
def score_backward_op(logits: Tensor, *args) -> Tensor:
    """dlogits of `score`, in a new buffer."""
    gradient = _new_gradient(logits)
    dispatch.find(args[-1]).score_backward(logits, *args[:-1], gradient)
    return gradient


@score_backward_op.register_fake
def _(logits, *args):
    return _new_gradient(logits)


@custom_op(
    "mr1fast::score_backward_",
    mutates_args=("logits",),
    schema=f"(Tensor(a!) logits, {_SCORED}, float temperature, str backend) -> ()",
)
def score_backward_inplace_op(logits: Tensor, *args) -> None:
    """dlogits of `score`, written over the logits."""
    dispatch.find(args[-1]).score_backward(logits, *args[:-1], logits)


@score_backward_inplace_op.register_fake
def _(logits, *args):
    return None


@custom_op("mr1fast::scale_", mutates_args=("gradient",))
def scale_op(gradient: Tensor, factor: Tensor) -> None:
    """gradient [B, L, V], [V, H] or [V] *= factor (0-d), without a visit of the memory where the factor is 1."""
    if gradient.is_cuda and triton_backend.why_not(gradient) is None:
        from mr1fast.kernels import triton_score

        rows = gradient if gradient.dim() == 3 else gradient.view(1, -1, gradient.shape[-1])
        triton_score.scale_unless_one(rows, factor)
    elif factor.item() != 1:
        gradient.mul_(factor.to(gradient.dtype))


@scale_op.register_fake
def _(gradient, factor):
    return None


def scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """gradient * factor (0-d), in place."""
    # On a CPU outside of a compiled graph the question is free, and a factor of 1 leaves even the version alone, so
    # that backward can run twice. Where the factor is not 1 a second backward raises: the saved gradient has changed.
    if torch.compiler.is_compiling() or gradient.is_cuda or factor.item() != 1:
        scale_op(gradient, factor)
    return gradient
