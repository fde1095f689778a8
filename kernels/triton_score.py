"""Scoring in Triton: log-probability and entropy of each row in one visit, and their gradient in another."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mr1fast.kernels import reference
from mr1fast.kernels.reference import LogitMap
from mr1fast.kernels.triton_rows import (
    LN_2,
    LOG2_E,
    NEG_INF,
    capped,
    kernel_arguments,
    row_statistics,
    rows_aligned,
    split_row,
    tile_columns,
    tile_settings,
    write_gradient,
    write_zeros,
)

# See `_STEPWISE` in triton_loss.py for what the two lists of each kernel are for.


@triton.jit(
    do_not_specialize=["logits_stride_b", "logits_stride_l", "L", "temperature", "softcap"],
    do_not_specialize_on_alignment=["ids_ptr", "mask_ptr", "temperatures_ptr", "logp_ptr", "entropy_ptr", "lse_ptr"],
)
def score_fwd_kernel(
    logits_ptr,  # [B, L, V]
    logits_stride_b: tl.int64,
    logits_stride_l: tl.int64,
    L,
    ids_ptr,  # [B, L] int64, contiguous
    mask_ptr,  # [B, L] bool, contiguous, or None
    temperature,
    softcap,  # or None
    temperatures_ptr,  # [B, L] contiguous, or None: temperature
    logp_ptr,  # out, all [B, L] contiguous
    entropy_ptr,  # out
    lse_ptr,  # out, of the capped logits over temperature
    V: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    W: tl.constexpr,
    STAGES: tl.constexpr,
):
    b, l = split_row(L)
    at = b * L + l
    if mask_ptr is not None:
        if tl.load(mask_ptr + at) == 0:
            tl.store(logp_ptr + at, 0.0)
            tl.store(entropy_ptr + at, 0.0)
            tl.store(lse_ptr + at, 0.0)
            return
    logits_ptr += tl.multiple_of(b * logits_stride_b + l * logits_stride_l, W)
    id = tl.load(ids_ptr + at)
    tl.device_assert((id >= 0) & (id < V), "completion_ids out of range at an unmasked position")
    x_id = tl.load(logits_ptr + id).to(tl.float32)
    if temperatures_ptr is not None:
        temperature = tl.load(temperatures_ptr + at)
    scale = tl.div_rn(LOG2_E, temperature)
    base, log2_sum, entropy = row_statistics(logits_ptr, scale, softcap, V, C, T, W, STAGES)
    tl.store(logp_ptr + at, ((capped(x_id, softcap) - base) * scale - log2_sum) * LN_2)
    tl.store(entropy_ptr + at, entropy)
    tl.store(lse_ptr + at, base / temperature + log2_sum * LN_2)


@triton.jit(
    do_not_specialize=[
        "logits_stride_b", "logits_stride_l", "grad_stride_b", "grad_stride_l", "L", "temperature", "softcap",
    ],
    do_not_specialize_on_alignment=[
        "ids_ptr", "mask_ptr", "lse_ptr", "entropy_ptr", "grad_logp_ptr", "grad_entropy_ptr", "temperatures_ptr",
    ],
)  # fmt: skip
def score_bwd_kernel(
    logits_ptr,  # [B, L, V]
    logits_stride_b: tl.int64,
    logits_stride_l: tl.int64,
    grad_ptr,  # out: [B, L, V], may be logits_ptr
    grad_stride_b: tl.int64,
    grad_stride_l: tl.int64,
    L,
    ids_ptr,  # all [B, L] contiguous; int64
    mask_ptr,  # bool, or None
    lse_ptr,
    entropy_ptr,
    grad_logp_ptr,
    grad_entropy_ptr,  # or None
    temperature,
    softcap,  # or None
    temperatures_ptr,  # or None: temperature
    V: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    W: tl.constexpr,
    STAGES: tl.constexpr,
):
    b, l = split_row(L)
    at = b * L + l
    grad_ptr += tl.multiple_of(b * grad_stride_b + l * grad_stride_l, W)
    if mask_ptr is not None:
        if tl.load(mask_ptr + at) == 0:
            write_zeros(grad_ptr, V, C, T, W)
            return
    if temperatures_ptr is not None:
        temperature = tl.load(temperatures_ptr + at)
    on_logp = tl.load(grad_logp_ptr + at) / temperature
    on_entropy = None
    if grad_entropy_ptr is not None:
        on_entropy = -tl.load(grad_entropy_ptr + at) / temperature
    if on_entropy is None:
        if on_logp == 0:
            write_zeros(grad_ptr, V, C, T, W)
            return
    logits_ptr += tl.multiple_of(b * logits_stride_b + l * logits_stride_l, W)
    id = tl.load(ids_ptr + at)
    tl.device_assert((id >= 0) & (id < V), "completion_ids out of range at an unmasked position")
    x_id = tl.load(logits_ptr + id).to(tl.float32)
    on_logp = tl.where(x_id == NEG_INF, 0.0, on_logp)  # a banned id has no gradient
    base = tl.load(lse_ptr + at) * temperature  # relative to the log-sum-exp, exponents are log2 p: log2_sum is 0
    entropy = tl.load(entropy_ptr + at)
    tl.debug_barrier()  # in place: every thread has read x_id before the first one writes
    write_gradient(
        grad_ptr, logits_ptr, id, x_id, base, 0.0, entropy, tl.div_rn(LOG2_E, temperature), on_logp, on_entropy,
        softcap, V, C, T, W, STAGES,
    )  # fmt: skip


@triton.jit(do_not_specialize=["stride_b", "stride_l", "L"], do_not_specialize_on_alignment=["factor_ptr"])
def scale_fwd_kernel(
    x_ptr,  # [B, L, V], in place
    stride_b: tl.int64,
    stride_l: tl.int64,
    L,
    factor_ptr,  # [] float32
    V: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    W: tl.constexpr,
):
    factor = tl.load(factor_ptr)
    if factor == 1:
        return
    b, l = split_row(L)
    x_ptr += tl.multiple_of(b * stride_b + l * stride_l, W)
    columns = tile_columns(C, T, W)
    for start in range(0, V, C * T * W):
        mask = start + columns < V
        x = tl.load(x_ptr + (start + columns), mask=mask).to(tl.float32)
        tl.store(x_ptr + (start + columns), (x * factor).to(x_ptr.dtype.element_ty), mask=mask)


def score_forward(
    logits: Tensor, ids: Tensor, mask: Tensor | None, logit_map: LogitMap
) -> tuple[Tensor, Tensor, Tensor]:
    """(logps, entropies, lse), float32 [B, L], 0 where masked; see `dispatch.Backend`."""
    B, L, V = logits.shape
    reference.check_ids(ids, mask, V)
    logps, entropies, lse = (torch.empty((B, L), dtype=torch.float32, device=logits.device) for _ in range(3))
    if B * L > 0:
        with torch.cuda.device_of(logits):
            score_fwd_kernel[(B * L,)](
                logits, *logits.stride()[:2], L,
                ids.contiguous(), None if mask is None else mask.contiguous(), *kernel_arguments(logit_map),
                logps, entropies, lse,
                **tile_settings("score", V, logits.element_size(), rows_aligned(logits)),
            )  # fmt: skip
    return logps, entropies, lse


def score_backward(
    logits: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    lse: Tensor,
    entropies: Tensor,
    grad_logps: Tensor,
    grad_entropies: Tensor | None,
    logit_map: LogitMap,
    grad: Tensor,
) -> None:
    """Write the gradient of `score_forward` into `grad`, which may be the logits; see `dispatch.Backend`."""
    B, L, V = logits.shape
    if B * L > 0:
        with torch.cuda.device_of(logits):
            score_bwd_kernel[(B * L,)](
                logits, *logits.stride()[:2], grad, *grad.stride()[:2], L,
                ids.contiguous(), None if mask is None else mask.contiguous(),
                lse.contiguous(), entropies.contiguous(), grad_logps.contiguous(),
                None if grad_entropies is None else grad_entropies.contiguous(),
                *kernel_arguments(logit_map),
                **tile_settings("score_backward", V, logits.element_size(), rows_aligned(logits, grad)),
            )  # fmt: skip


def scale_unless_one(gradient: Tensor, factor: Tensor) -> None:
    """gradient [B, L, V] *= factor (0-d), decided on the device: if it is 1, the gradient is not touched."""
    B, L, V = gradient.shape
    assert gradient.stride(-1) == 1 or V == 1
    if B * L > 0:
        settings = tile_settings("score_backward", V, gradient.element_size(), rows_aligned(gradient))
        del settings["STAGES"]
        with torch.cuda.device_of(gradient):
            scale_fwd_kernel[(B * L,)](
                gradient, *gradient.stride()[:2], L, factor.to(torch.float32), **settings
            )  # fmt: skip
