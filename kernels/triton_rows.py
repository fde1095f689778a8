"""What the Triton kernels of the loss head share: the walk over one row of logits, and the geometry of a launch.

A program owns one row and visits it in tiles [C, T, W]: W neighbouring columns are one 16-byte load, T threads stand
side by side, and C such loads belong to one thread. Maxima and sums over C and W therefore stay inside a thread, the
running statistics are vectors [T], and warps wait for each other once a row, not once a tile.

Exponentials are taken to base 2, with 1 / temperature folded into `scale`: exp(x / temperature) = exp2(x * scale).

Over a row three statistics are kept, from which all else follows. With d_j = (x_j - top) * scale:

    top = max x_j        total = sum 2^d_j        weighted = sum 2^d_j d_j
    log2 p_j = d_j - log2(total)        entropy = -sum p_j ln p_j = ln 2 (log2(total) - weighted / total)
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from mr1fast.kernels.reference import LogitMap
from mr1fast.kernels.triton_table import TABLE

NEG_INF = tl.constexpr(float("-inf"))
LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))
# In place of the exponent -inf of a banned token (logit -inf): exp2 of it is exactly 0, too, but 0 * FLOOR is no NaN.
FLOOR = tl.constexpr(-256.0)

# ---- device ---------------------------------------------------------------------------------------------------------


@triton.jit
def split_row(L):
    """(completion, position) of this program's row; int64, as N * V passes 2^31 at 14k rows of a large vocabulary."""
    row = tl.program_id(0).to(tl.int64)
    return row // L, row % L


@triton.jit
def tile_columns(C: tl.constexpr, T: tl.constexpr, W: tl.constexpr):
    """Column numbers [C, T * W] of a tile that starts at column 0.

    Two dimensions, as Triton 3.6 lays three out across the threads otherwise: sums over C and W, after a reshape to
    [C, T, W], would then be shuffles between threads in every tile.
    """
    c = tl.arange(0, C)[:, None]
    t = tl.arange(0, T * W)[None, :]
    return c * (T * W) + t


@triton.jit
def capped(x, softcap):
    """softcap * tanh(x / softcap), or x if softcap is None. A banned token (-inf) stays banned."""
    if softcap is not None:
        x = tl.where(x == NEG_INF, x, softcap - 2 * softcap / (1 + tl.exp2(x * tl.div_rn(2 * LOG2_E, softcap))))
    return x


@triton.jit
def cap_slope(x, softcap):
    """The derivative of `capped`: 1 - tanh^2. softcap is not None."""
    tanh = 1 - 2 / (1 + tl.exp2(x * tl.div_rn(2 * LOG2_E, softcap)))
    return 1 - tanh * tanh


@triton.jit
def exponent(x, base, scale):
    """log2 of exp((x - base) / temperature), but at least FLOOR; a NaN stays one."""
    return tl.maximum((x - base) * scale, FLOOR, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _fold(top, total, weighted, x, scale):
    """Take the tile x [C, T, W] into the running statistics [T]: one exp2 an element, and one a thread and tile.

    A new maximum shifts every exponent so far by the same amount: 2^(d + shift) (d + shift) sums up to
    2^shift (weighted + total * shift).
    """
    new_top = tl.maximum(top, tl.max(tl.max(x, 2), 0))
    base = tl.where(new_top == NEG_INF, 0.0, new_top)  # nothing but banned tokens so far: avoid inf - inf
    d = exponent(x, base[None, :, None], scale)
    e = tl.exp2(d)
    shift = exponent(top, base, scale)
    kept = tl.exp2(shift)
    weighted = kept * (weighted + total * shift) + tl.sum(tl.sum(e * d, 2), 0)
    total = kept * total + tl.sum(tl.sum(e, 2), 0)
    return new_top, total, weighted


@triton.jit
def row_statistics(
    row_ptr, scale, softcap, V: tl.constexpr, C: tl.constexpr, T: tl.constexpr, W: tl.constexpr, STAGES: tl.constexpr
):
    """(base, log2_sum, entropy) of one row of V logits, capped, in one visit.

    base is the row's maximum, log2_sum = log2(sum exp2((x - base) * scale)); the entropy is in nats.
    """
    top = tl.full([T], NEG_INF, tl.float32)
    total = tl.zeros([T], tl.float32)
    weighted = tl.zeros([T], tl.float32)  # sum of exp2(d) * d, d = (x - top) * scale
    columns = tile_columns(C, T, W)
    for tile in tl.range(0, V // (C * T * W), num_stages=STAGES):
        x = tl.reshape(tl.load(row_ptr + (tile * (C * T * W) + columns)), [C, T, W]).to(tl.float32)
        top, total, weighted = _fold(top, total, weighted, capped(x, softcap), scale)
    if V % (C * T * W) != 0:
        columns += V // (C * T * W) * (C * T * W)
        x = tl.reshape(tl.load(row_ptr + columns, mask=columns < V, other=NEG_INF), [C, T, W]).to(tl.float32)
        top, total, weighted = _fold(top, total, weighted, capped(x, softcap), scale)
    base = tl.max(top, 0)
    shift = exponent(top, base, scale)
    kept = tl.exp2(shift)
    sum_e = tl.sum(kept * total, 0)
    log2_sum = tl.log2(sum_e)
    return base, log2_sum, (log2_sum - tl.sum(kept * (weighted + total * shift), 0) / sum_e) * LN_2


@triton.jit
def _logit_gradient(x, base, log2_sum, entropy, scale, on_logp, on_entropy, softcap):
    """dloss/dx of a logit other than the sampled token's, whose is `on_logp` more (times the slope of the cap).

    With on_logp = dloss/dlogp and on_entropy = -dloss/dentropy, both over the temperature, it is
    on_logp (1[j = id] - p_j) + on_entropy p_j (ln p_j + entropy). on_entropy may be None.
    """
    log2_p = exponent(capped(x, softcap), base, scale) - log2_sum
    p = tl.exp2(log2_p)
    if on_entropy is None:
        gradient = -on_logp * p
    else:
        gradient = p * (on_entropy * (log2_p * LN_2 + entropy) - on_logp)
    if softcap is not None:
        gradient *= cap_slope(x, softcap)
    return gradient


@triton.jit
def write_gradient(
    grad_ptr,
    row_ptr,
    id,
    x_id,
    base,
    log2_sum,
    entropy,
    scale,
    on_logp,
    on_entropy,
    softcap,
    V: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    W: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The gradient of one row; grad_ptr may be row_ptr. x_id [] is the id's logit, which every thread has read before.

    Backwards, so that it begins with what the first visit has left in L2; evict_first on both sides, because nobody
    needs it again.
    """
    columns = tile_columns(C, T, W)
    TILES: tl.constexpr = V // (C * T * W)
    if V % (C * T * W) != 0:
        tail = TILES * (C * T * W) + columns
        x = tl.load(row_ptr + tail, mask=tail < V, other=NEG_INF, eviction_policy="evict_first").to(tl.float32)
        gradient = _logit_gradient(x, base, log2_sum, entropy, scale, on_logp, on_entropy, softcap)
        tl.store(grad_ptr + tail, gradient.to(grad_ptr.dtype.element_ty), mask=tail < V, eviction_policy="evict_first")
    for tile in tl.range(0, TILES, num_stages=STAGES):
        at = (TILES - 1 - tile) * (C * T * W) + columns
        x = tl.load(row_ptr + at, eviction_policy="evict_first").to(tl.float32)
        gradient = _logit_gradient(x, base, log2_sum, entropy, scale, on_logp, on_entropy, softcap)
        tl.store(grad_ptr + at, gradient.to(grad_ptr.dtype.element_ty), eviction_policy="evict_first")
    # The sampled token's is written again. That costs a barrier a row; to compare columns would cost every element.
    tl.debug_barrier()
    hit = on_logp
    if softcap is not None:
        hit *= cap_slope(x_id, softcap)
    gradient = _logit_gradient(x_id, base, log2_sum, entropy, scale, on_logp, on_entropy, softcap) + hit
    tl.store(grad_ptr + id, gradient.to(grad_ptr.dtype.element_ty))


@triton.jit
def write_zeros(grad_ptr, V: tl.constexpr, C: tl.constexpr, T: tl.constexpr, W: tl.constexpr):
    """Zero one row of V elements, reading nothing."""
    columns = tile_columns(C, T, W)
    zeros = tl.zeros([C, T * W], grad_ptr.dtype.element_ty)
    for start in range(0, V, C * T * W):
        tl.store(grad_ptr + (start + columns), zeros, mask=start + columns < V, eviction_policy="evict_first")


# ---- host -----------------------------------------------------------------------------------------------------------


def kernel_arguments(logit_map: LogitMap) -> tuple[float, float | None, Tensor | None]:
    """temperature, softcap and temperatures: whether the latter two are None is compiled in, no value is."""
    softcap = None if logit_map.softcap == math.inf else float(logit_map.softcap)
    each = logit_map.temperatures
    return float(logit_map.temperature), softcap, None if each is None else each.contiguous()


def tile_settings(op: str, V: int, itemsize: int, aligned: bool) -> dict[str, int | bool]:
    """What a launch of `op` ("score", "score_backward", "loss") on rows of V elements fixes at compile time.

    From `triton_table.TABLE`; `aligned`: every row starts on a 16-byte boundary.
    """
    limits = [limit for name, size, limit in TABLE if (name, size) == (op, itemsize)]
    block, warps, stages = TABLE[op, itemsize, min(limit for limit in limits if limit >= V or limit == max(limits))]
    width = 16 // itemsize if aligned else 1
    threads = 32 * warps
    return {
        "V": V,
        "C": max(min(block, triton.next_power_of_2(V)) // (threads * width), 1),
        "T": threads,
        "W": width,
        "STAGES": stages,
        "num_warps": warps,
        # tl.device_assert is only compiled in with debug; the overflow checks that debug implies are turned off.
        "debug": True,
        "sanitize_overflow": False,
        "enable_fp_fusion": True,  # spelled out because Triton 3.10 changes the default
    }


def rows_aligned(*tensors: Tensor) -> bool:
    """Whether every row of these [B, L, V] tensors starts on a 16-byte boundary."""
    return all(
        tensor.data_ptr() % 16 == 0
        and all(s * tensor.element_size() % 16 == 0 for s, n in zip(tensor.stride()[:2], tensor.shape) if n > 1)
        for tensor in tensors
    )
