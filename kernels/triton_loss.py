"""The one pass in Triton: a row's statistics, its objective and its finished gradient in a single visit of the row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mr1fast.kernels import reference
from mr1fast.kernels.reference import LogitMap, LossBatch, LossSpec, Outputs
from mr1fast.kernels.triton_objective import group_advantage, token_objective, token_spec
from mr1fast.kernels.triton_rows import (
    LN_2,
    LOG2_E,
    capped,
    kernel_arguments,
    row_statistics,
    rows_aligned,
    split_row,
    tile_settings,
    write_gradient,
    write_zeros,
)

# What changes from step to step must not enter the key under which Triton looks for a compiled kernel. By itself Triton
# puts in it whether an integer is 1 or a multiple of 16, and whether an address is a multiple of 16. The former is
# switched off for sizes and strides, the latter for the small tensors, which are often views. (Floats never enter it.)
# The logits keep the hint of their address, V is a constant, and the alignment of the rows is W, so that the loads of a
# row are 16 bytes wide wherever they can be.
_STEPWISE = (
    "logits_stride_b logits_stride_l grad_stride_b grad_stride_l L B G advantage_stride_b advantage_stride_l "
    "is_ratio_stride_b is_ratio_stride_l weight_stride_b weight_stride_l beta_stride_b beta_stride_l "
    "epsilon_low_stride_b epsilon_low_stride_l epsilon_high_stride_b epsilon_high_stride_l temperature softcap"
).split()
_SMALL = (
    "ids_ptr mask_ptr advantages_ptr rewards_ptr old_ptr ref_ptr is_ratio_ptr weight_ptr entropy_weight_ptr beta_ptr "
    "epsilon_low_ptr epsilon_high_ptr temperatures_ptr share_ptr loss_ptr logp_ptr entropy_ptr kl_ptr is_low_ptr "
    "is_high_ptr coef_ptr"
).split()


@triton.jit
def _store_token(
    at, share_ptr, loss_ptr, logp_ptr, entropy_ptr, kl_ptr, is_low_ptr, is_high_ptr, coef_ptr,
    share, loss, logp, entropy, kl, is_low, is_high, coef,
):  # fmt: skip
    tl.store(share_ptr + at, share)
    tl.store(loss_ptr + at, loss)
    tl.store(logp_ptr + at, logp)
    tl.store(entropy_ptr + at, entropy)
    if kl_ptr is not None:
        tl.store(kl_ptr + at, kl)
    tl.store(is_low_ptr + at, is_low)
    tl.store(is_high_ptr + at, is_high)
    tl.store(coef_ptr + at, coef)


@triton.jit(do_not_specialize=_STEPWISE, do_not_specialize_on_alignment=_SMALL)
def grpo_loss_fwd_kernel(
    logits_ptr,  # [B, L, V]
    logits_stride_b: tl.int64,
    logits_stride_l: tl.int64,
    grad_ptr,  # [B, L, V], may be logits_ptr; None: no gradient
    grad_stride_b: tl.int64,
    grad_stride_l: tl.int64,
    L,
    ids_ptr,  # [B, L] int64, contiguous, as are mask, old and ref
    mask_ptr,  # [B, L] bool or None
    advantages_ptr,  # [B, L] or None, then:
    advantage_stride_b: tl.int64,
    advantage_stride_l: tl.int64,
    rewards_ptr,  # [B] or None
    B,
    G,
    old_ptr,  # [B, L] or None
    ref_ptr,  # [B, L] or None
    is_ratio_ptr,  # [B, L] or None
    is_ratio_stride_b: tl.int64,
    is_ratio_stride_l: tl.int64,
    weight_ptr,  # [B, L]
    weight_stride_b: tl.int64,
    weight_stride_l: tl.int64,
    entropy_weight_ptr,  # [] or None
    beta_ptr,  # [B, L]
    beta_stride_b: tl.int64,
    beta_stride_l: tl.int64,
    epsilon_low_ptr,  # [B, L], or None: spec.epsilon_low
    epsilon_low_stride_b: tl.int64,
    epsilon_low_stride_l: tl.int64,
    epsilon_high_ptr,  # [B, L], or None: spec.epsilon_high
    epsilon_high_stride_b: tl.int64,
    epsilon_high_stride_l: tl.int64,
    spec,  # a TokenSpec
    temperature,
    softcap,  # or None
    temperatures_ptr,  # [B, L] contiguous, or None: temperature
    share_ptr,  # out, all [B, L] contiguous: what the token adds to the loss
    loss_ptr,  # out: per-token loss, unweighted
    logp_ptr,  # out
    entropy_ptr,  # out
    kl_ptr,  # out, or None
    is_low_ptr,  # out
    is_high_ptr,  # out
    coef_ptr,  # out: weight * dloss_dlogp
    SCALE_REWARDS: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    W: tl.constexpr,
    STAGES: tl.constexpr,
):
    b, l = split_row(L)
    at = b * L + l
    if grad_ptr is not None:
        grad_ptr += tl.multiple_of(b * grad_stride_b + l * grad_stride_l, W)
    if mask_ptr is not None:
        if tl.load(mask_ptr + at) == 0:
            _store_token(
                at, share_ptr, loss_ptr, logp_ptr, entropy_ptr, kl_ptr, is_low_ptr, is_high_ptr, coef_ptr,
                0.0, 0.0, 0.0, 0.0, 0.0, False, False, 0.0,
            )  # fmt: skip
            if grad_ptr is not None:
                write_zeros(grad_ptr, V, C, T, W)
            return
    logits_ptr += tl.multiple_of(b * logits_stride_b + l * logits_stride_l, W)

    # All small loads come first: their latency hides behind the row, and an in-place call overwrites the id's logit.
    id = tl.load(ids_ptr + at)
    tl.device_assert((id >= 0) & (id < V), "completion_ids out of range at an unmasked position")
    x_id = tl.load(logits_ptr + id).to(tl.float32)
    weight = tl.load(weight_ptr + b * weight_stride_b + l * weight_stride_l)
    beta = tl.load(beta_ptr + b * beta_stride_b + l * beta_stride_l)
    epsilon_low = spec.epsilon_low
    if epsilon_low_ptr is not None:
        epsilon_low = tl.load(epsilon_low_ptr + b * epsilon_low_stride_b + l * epsilon_low_stride_l)
    epsilon_high = spec.epsilon_high
    if epsilon_high_ptr is not None:
        epsilon_high = tl.load(epsilon_high_ptr + b * epsilon_high_stride_b + l * epsilon_high_stride_l)
    old_logp = None
    if old_ptr is not None:
        old_logp = tl.load(old_ptr + at)
    ref_logp = None
    if ref_ptr is not None:
        ref_logp = tl.load(ref_ptr + at)
    is_ratio = None
    if is_ratio_ptr is not None:
        is_ratio = tl.load(is_ratio_ptr + b * is_ratio_stride_b + l * is_ratio_stride_l)
    if advantages_ptr is not None:
        advantage = tl.load(advantages_ptr + b * advantage_stride_b + l * advantage_stride_l)
    else:
        advantage = group_advantage(rewards_ptr, b, B, G, SCALE_REWARDS)
    if temperatures_ptr is not None:
        temperature = tl.load(temperatures_ptr + at)

    scale = tl.div_rn(LOG2_E, temperature)
    base, log2_sum, entropy = row_statistics(logits_ptr, scale, softcap, V, C, T, W, STAGES)
    logp = ((capped(x_id, softcap) - base) * scale - log2_sum) * LN_2
    loss, slope, kl, is_low, is_high = token_objective(
        logp, old_logp, ref_logp, advantage, is_ratio, beta, epsilon_low, epsilon_high, spec
    )
    coef = weight * slope
    share = weight * loss
    on_entropy = None
    if entropy_weight_ptr is not None:
        entropy_weight = tl.load(entropy_weight_ptr)
        share -= entropy_weight * entropy
        on_entropy = entropy_weight / temperature
    _store_token(
        at, share_ptr, loss_ptr, logp_ptr, entropy_ptr, kl_ptr, is_low_ptr, is_high_ptr, coef_ptr,
        share, loss, logp, entropy, kl, is_low, is_high, coef,
    )  # fmt: skip

    if grad_ptr is not None:
        if on_entropy is None and coef == 0:
            write_zeros(grad_ptr, V, C, T, W)
        else:
            write_gradient(
                grad_ptr, logits_ptr, id, x_id, base, log2_sum, entropy, scale, coef / temperature, on_entropy,
                softcap, V, C, T, W, STAGES,
            )  # fmt: skip


def _strided(tensor: Tensor | None) -> tuple[Tensor | None, int, int]:
    """A tensor [B, L], perhaps expanded, with its strides; or what stands for none."""
    return (None, 0, 0) if tensor is None else (tensor, tensor.stride(0), tensor.stride(1))


def grpo_forward(logits: Tensor, batch: LossBatch, spec: LossSpec, grad: Tensor | None) -> Outputs:
    """The one pass; see `dispatch.Backend`."""
    B, L, V = logits.shape
    reference.check_ids(batch.ids, batch.mask, V)
    values = [torch.empty((B, L), dtype=torch.float32, device=logits.device) for _ in range(5)]
    share, per_token_loss, logps, entropies, coef = values
    kl = None if batch.ref_logps is None else torch.empty_like(logps)
    is_low, is_high = (torch.empty((B, L), dtype=torch.bool, device=logits.device) for _ in range(2))
    aligned = rows_aligned(logits) if grad is None else rows_aligned(logits, grad)
    if B * L > 0:
        with torch.cuda.device_of(logits):
            grpo_loss_fwd_kernel[(B * L,)](
                logits, logits.stride(0), logits.stride(1),
                grad, *((0, 0) if grad is None else grad.stride()[:2]),
                L,
                batch.ids.contiguous(),
                None if batch.mask is None else batch.mask.contiguous(),
                *_strided(batch.advantages),
                batch.rewards if batch.advantages is None else None, B, batch.num_generations,
                None if batch.old_logps is None else batch.old_logps.contiguous(),
                None if batch.ref_logps is None else batch.ref_logps.contiguous(),
                *_strided(batch.is_ratio), *_strided(batch.token_weight),
                batch.entropy_weight,
                *_strided(batch.beta.expand(B, L)), *_strided(batch.epsilons_low), *_strided(batch.epsilons_high),
                token_spec(spec), *kernel_arguments(LogitMap.of(batch, spec)),
                share, per_token_loss, logps, entropies, kl, is_low, is_high, coef,
                SCALE_REWARDS=batch.scale_rewards if batch.advantages is None else "none",
                **tile_settings("loss", V, logits.element_size(), aligned),
            )  # fmt: skip
    return share.sum(), per_token_loss, logps, entropies, kl, is_low, is_high, coef
