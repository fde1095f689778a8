"""The loss head from hidden states: blocks of rows go through one reused buffer; there is never an [N, V] tensor.

The N rows are the B * L tokens without those that are masked, H is the hidden width, V the vocabulary. There are two
ways, as in autograd.py:

- one pass, three GEMMs: logits = hidden @ weight.T into the buffer, the backend's kernel in place over it, then
  dhidden = dlogits @ weight and dweight += dlogits.T @ hidden. All that a row's gradient needs is known once its
  log-sum-exp is, so nothing is recomputed. Rows whose coefficient is exactly 0 stay out of the last two GEMMs.
- two passes, four GEMMs: the first pass keeps nothing but [B, L] tensors; backward computes the logits again, for rows
  with a gradient only.

These functions know nothing of autograd (linear_op.py does). On a GPU the CPU waits once a block, for the number of
rows in it that have a gradient, unless a KL term or an entropy bonus gives (nearly) all of them one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mr1fast.kernels import autograd, cpp, dispatch, reference
from mr1fast.kernels.reference import LogitMap, LossBatch, LossSpec
from mr1fast.kernels.torch_backend import TORCH


class How(NamedTuple):
    backend: str
    dtype: torch.dtype  # of the GEMMs' operands and of the logits
    chunk_bytes: int | None  # None: as in BLOCKS


Needed = Sequence[bool]  # whether hidden, weight and bias need a gradient
Found = tuple[Tensor | None, Tensor | None, Tensor | None]  # their gradients, None where not needed


class Blocks(NamedTuple):
    """How large the blocks of logits are on a kind of device."""

    chunk_bytes: int
    min_rows: int  # with fewer a GEMM spends more time on reading and writing its [V, H] operand than on multiplying
    count_sum: bool  # see Head.buffer


# 2.6 GB hold 8,556 rows of Qwen2-VL's 151,936 logits in bfloat16.
BLOCKS = {"cpu": Blocks(160 * 2**20, 64, count_sum=False), "gpu": Blocks(2_600_000_000, 512, count_sum=True)}
ALIGN_ROWS = 16
_GROUP = 32  # rows moved at a time


@dataclass(frozen=True)
class Head:
    """The language-model head of a call and the hidden states it is applied to (`Head.of` checks nothing)."""

    hidden: Tensor  # [B * L, H], rows may be masked
    weight: Tensor  # [V, H] in how.dtype
    bias: Tensor | None  # [V] in how.dtype
    how: How
    gradient_dtype: torch.dtype  # of the weight as it was passed

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor, bias: Tensor | None, how: How) -> Head:
        bias = None if bias is None else bias.to(how.dtype)
        rows = hidden.reshape(-1, hidden.shape[-1])
        return cls(rows, weight.to(how.dtype), bias, how, weight.dtype)

    def buffer(self, rows: int, *, sums_weight: bool) -> Tensor:
        """A buffer for a block of logits [n, V]: all `rows`, or as many as `chunk_bytes` holds, or the least number.

        sums_weight: whether the weight's gradient is computed, block by block. From a single block it comes as it is;
        over several it is summed in float32, which for a 16-bit weight takes V * H * 2 bytes more than the gradient, as
        much as H rows of logits, and is read and written for every block. On a GPU these bytes count, up to half of
        `chunk_bytes`: one block may have H rows more than each of several, and takes less time.
        """
        blocks = BLOCKS["cpu" if self.hidden.device.type == "cpu" else "gpu"]
        V = self.weight.shape[0]
        budget, row_bytes = self.how.chunk_bytes or blocks.chunk_bytes, V * self.how.dtype.itemsize
        if rows * row_bytes > budget and sums_weight and blocks.count_sum:
            more = reference.compute_dtype(self.how.dtype).itemsize - self.gradient_dtype.itemsize
            budget = max(budget - self.weight.numel() * more, budget // 2)
        most = max(budget // row_bytes // ALIGN_ROWS * ALIGN_ROWS, blocks.min_rows)
        if rows > most:  # blocks of equal size rather than a small last one
            per_block = -(-rows // -(-rows // most))
            rows = -(-per_block // ALIGN_ROWS) * ALIGN_ROWS if most >= ALIGN_ROWS else per_block
        return torch.empty(rows, V, dtype=self.how.dtype, device=self.hidden.device)

    @property
    def in_pieces(self) -> bool:
        """Whether csrc/head_gemms.cpp runs the GEMMs over the vocabulary."""
        return self.hidden.device.type == "cpu" and cpp.MISSING is None

    def rows(self, index: Tensor) -> Tensor:
        return self.hidden.index_select(0, index).to(self.how.dtype)

    def logits(self, index: Tensor, out: Tensor) -> None:
        """Logits of the rows `index` [n] of the hidden states into `out` [n, V]."""
        rows = self.rows(index)
        if self.in_pieces:
            torch.ops.mr1fast_native.head_logits(rows, self.weight, self.bias, out)
        elif self.bias is None:
            torch.mm(rows, self.weight.t(), out=out)
        else:
            torch.addmm(self.bias, rows, self.weight.t(), out=out)


class Gradients:
    """Gradients of hidden states, weight and bias, summed over blocks; None for those that are not needed.

    Those of weight and bias are summed in float32 (or float64): bfloat16 would round at every block, and lose digits.
    """

    def __init__(self, head: Head, needed: Needed):
        self.head, self.sums = head, reference.compute_dtype(head.how.dtype)
        self.needs_hidden, self.needs_weight, self.needs_bias = needed
        self.hidden = head.hidden.new_zeros(head.hidden.shape) if self.needs_hidden else None
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    def add(self, index: Tensor, dlogits: Tensor, *, last: bool) -> None:
        """Add the gradient dlogits [n, V] of the rows `index` [n]; last: whether this is the last call."""
        if self.hidden is not None:
            self.hidden.index_copy_(0, index, torch.mm(dlogits, self.head.weight).to(self.hidden.dtype))
        if self.needs_weight:
            self._add_weight(dlogits, self.head.rows(index), last)
        if self.needs_bias:
            self.bias = dlogits.sum(0, dtype=self.sums).add_(0 if self.bias is None else self.bias)

    def _add_weight(self, dlogits: Tensor, rows: Tensor, last: bool) -> None:
        """weight [V, H] += dlogits [n, V].T @ rows [n, H]"""
        first = self.weight is None
        if self.weight is None:
            # A single block needs no sum; the gradient of a float32 weight must not be rounded to 16 bits.
            direct = last and self.head.gradient_dtype == dlogits.dtype
            dtype = dlogits.dtype if direct else self.sums
            self.weight = torch.empty_like(self.head.weight, dtype=dtype, memory_format=torch.contiguous_format)
        total = self.weight
        widens: dict[str, Any] = {} if dlogits.dtype == total.dtype else {"out_dtype": total.dtype}
        if self.head.in_pieces:
            torch.ops.mr1fast_native.head_weight_gradient(dlogits, rows, total, not first)
        elif widens and not dlogits.is_cuda:
            # A CPU's 16-bit GEMM has no float32 output: each block's product is rounded, their sum is not.
            (total.copy_ if first else total.add_)(torch.mm(dlogits.t(), rows))
        elif first:
            torch.mm(dlogits.t(), rows, out=total, **widens)
        else:
            torch.addmm(total, dlogits.t(), rows, out=total, **widens)

    def result(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Found:
        """The gradients in the shapes and dtypes of the arguments; zeros where nothing was added."""

        def finished(total: Tensor | None, like: Tensor) -> Tensor:
            return like.new_zeros(like.shape) if total is None else total.to(like.dtype)

        return (
            None if self.hidden is None else self.hidden.view(hidden.shape),
            finished(self.weight, weight) if self.needs_weight else None,
            finished(self.bias, bias) if self.needs_bias and bias is not None else None,
        )


# ---- one pass -------------------------------------------------------------------------------------------------------


def grpo(
    hidden: Tensor,  # [B, L, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,
    batch: LossBatch,
    spec: LossSpec,
    how: How,
    needed: Needed,
) -> tuple[autograd.LossOutputs, Found]:
    """((loss, logps, entropies, kl, is_low_clipped, is_high_clipped), (dhidden, dweight, dbias))"""
    reference.check_ids(batch.ids, batch.mask, weight.shape[0])
    head, forward = Head.of(hidden, weight, bias, how), _find(how.backend).grpo_forward
    # loss, logps, entropies, kl, is_low_clipped, is_high_clipped
    dtypes = (reference.compute_dtype(how.dtype),) * 4 + (torch.bool,) * 2
    per_token = [torch.zeros(batch.ids.shape, dtype=dtype, device=hidden.device) for dtype in dtypes]
    # Of an entropy bonus every row has a gradient, of a KL term nearly all: to ask a GPU costs more than it saves.
    in_every_row = batch.entropy_weight is not None or (hidden.is_cuda and batch.ref_logps is not None)
    gradients, packed = Gradients(head, needed), None
    index = _unmasked(batch.ids, batch.mask)
    buffer = head.buffer(len(index), sums_weight=needed[1])
    kept: list[Tensor] = []  # the indices of the tokens whose gradients are at the front of the buffer
    start = filled = 0
    while start < len(index):
        stop = min(start + len(buffer) - filled, len(index))
        rows, last = index[start:stop], stop == len(index)
        z = buffer[None, filled : filled + len(rows)]
        head.logits(rows, z[0])
        packed = packed or _packed(batch, index)  # only now: a GPU, which has waited for `index`, multiplies meanwhile
        block = _columns(packed, start, stop)
        _, *found, coef = forward(z, block, spec, z if any(needed) else None)
        for whole, part in zip(per_token, found):
            if part is not None:
                whole.view(-1).index_copy_(0, rows, part[0])
        if any(needed):
            if not in_every_row:
                rows = _move_to_front(z[0], coef[0] != 0, rows)
            kept.append(rows)
            filled += len(rows)
            # Blocks with few kept rows share their GEMMs, because each GEMM visits the whole weight gradient.
            if filled and (last or filled > len(buffer) // 2):
                gradients.add(torch.cat(kept), buffer[:filled], last=last)
                kept, filled = [], 0
        start = stop

    per_token_loss, logps, entropies, kl, is_low, is_high = per_token
    loss = reference.aggregate(per_token_loss, entropies, batch)
    outputs = (loss, logps, entropies, None if batch.ref_logps is None else kl, is_low, is_high)
    z = buffer = None  # type: ignore[assignment]  # frees memory for the conversion of the weight's gradient
    return outputs, gradients.result(hidden, weight, bias)


def _find(backend: str) -> dispatch.Backend:
    return TORCH if backend == "torch" else dispatch.find(backend)


def _unmasked(ids: Tensor, mask: Tensor | None) -> Tensor:
    """Flat indices [N] of the tokens that count."""
    return torch.arange(ids.numel(), device=ids.device) if mask is None else mask.reshape(-1).nonzero()[:, 0]


def _packed(batch: LossBatch, index: Tensor) -> LossBatch:
    """The batch reduced to the tokens `index` [N], as one completion [1, N] with an advantage for each token."""
    batch = batch._replace(advantages=reference.token_advantages(batch), rewards=None, mask=None, cu_seqlens=None)
    return _per_token(batch, lambda tensor: tensor.reshape(-1)[index][None])


def _columns(batch: LossBatch, start: int, stop: int) -> LossBatch:
    return _per_token(batch, lambda tensor: tensor[:, start:stop])


def _per_token(batch: LossBatch, change: Callable[[Tensor], Tensor]) -> LossBatch:
    """The batch with `change` applied to every tensor [B, L] in it; tensors with fewer dimensions stay as they are."""
    return LossBatch._make(change(each) if isinstance(each, Tensor) and each.dim() == 2 else each for each in batch)


def _move_to_front(rows: Tensor, keep: Tensor, index: Tensor) -> Tensor:
    """Reorder `rows` [n, V] so that those with `keep` [n] come first; returns their `index` [n] in the new order.

    Kept rows from the end move into the gaps, in small groups: copying half a block at once would double the memory.
    """
    n, count = len(keep), int(keep.sum())
    if count == n:
        return index
    gaps = (~keep[:count]).nonzero()[:, 0]
    movers = keep[count:].nonzero()[:, 0] + count
    for to, source in zip(gaps.split(_GROUP), movers.split(_GROUP)):
        rows.index_copy_(0, to, rows.index_select(0, source))
    return index[:count].index_copy(0, gaps, index[movers])


# ---- two passes -----------------------------------------------------------------------------------------------------


def score(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    mask: Tensor | None,
    logit_map: LogitMap,
    how: How,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logps, entropies, lse), [B, L], 0 where masked."""
    reference.check_ids(ids, mask, weight.shape[0])
    head, forward = Head.of(hidden, weight, bias, how), _find(how.backend).score_forward
    index = _unmasked(ids, mask)
    buffer = head.buffer(len(index), sums_weight=False)
    like = torch.zeros(ids.shape, dtype=reference.compute_dtype(how.dtype), device=hidden.device)
    scored = (like, torch.zeros_like(like), torch.zeros_like(like))
    for rows in index.split(max(len(buffer), 1)):
        z = buffer[None, : len(rows)]
        head.logits(rows, z[0])
        part_map = _of_rows(logit_map, rows)
        for whole, part in zip(scored, forward(z, ids.reshape(-1)[rows][None], None, part_map)):
            whole.view(-1).index_copy_(0, rows, part[0])
    return scored


def _tokens(tensor: Tensor | None, index: Tensor) -> Tensor | None:
    """The tokens `index` [n] of a tensor [B, L], as [1, n]."""
    return None if tensor is None else tensor.reshape(-1)[index][None]


def _of_rows(logit_map: LogitMap, index: Tensor) -> LogitMap:
    return logit_map._replace(temperatures=_tokens(logit_map.temperatures, index))


def score_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    mask: Tensor | None,
    lse: Tensor,
    entropies: Tensor,
    grad_logps: Tensor,
    grad_entropies: Tensor | None,
    logit_map: LogitMap,
    how: How,
    needed: Needed,
) -> Found:
    """(dhidden, dweight, dbias); rows whose two gradients are exactly 0 are left out, the first GEMM included."""
    head, backward = Head.of(hidden, weight, bias, how), _find(how.backend).score_backward
    counts = grad_logps != 0 if grad_entropies is None else (grad_logps != 0) | (grad_entropies != 0)
    index = _unmasked(ids, counts if mask is None else counts & mask)
    buffer, gradients = head.buffer(len(index), sums_weight=needed[1]), Gradients(head, needed)

    per_token = (lse, entropies, grad_logps, grad_entropies)
    for start in range(0, len(index), max(len(buffer), 1)):
        rows = index[start : start + len(buffer)]
        z = buffer[None, : len(rows)]
        head.logits(rows, z[0])
        part_map = _of_rows(logit_map, rows)
        backward(z, _tokens(ids, rows), None, *(_tokens(t, rows) for t in per_token), part_map, z)
        gradients.add(rows, z[0], last=start + len(rows) == len(index))
    z = buffer = None  # type: ignore[assignment]
    return gradients.result(hidden, weight, bias)
