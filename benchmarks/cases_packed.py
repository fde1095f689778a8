"""`packed`: what padding costs, at lengths as rollouts have them: lognormal, their mean about a third of the longest.

The same completions as [B, L] with a mask and packed as [T] with cu_seqlens, from hidden states and from logits. The
limit is ours on [B, L] with every position a token, so `of limit` is the share of the tokens divided by the share of
the time: 1 where no row of padding is read or multiplied. The peers are given what they take: padded tensors, or the
unmasked rows, as TRL's forward selects them on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from benchmarks import cases_linear, cases_loss, linear_inputs
from benchmarks import linear_peers as peers
from benchmarks.cases import Call, Case, Scene
from mr1fast import grpo_loss, linear_grpo_loss

SHAPES = ((16, 192, 256, 32000),)  # B, L (the longest completion), H, V
QUICK_SHAPES = ((4, 32, 16, 512),)
DTYPES = (torch.float32, torch.bfloat16)
SIGMA = 0.72  # of the logarithms of the lengths: with 16 completions the mean is a third of the longest
FULL = "mr1fast cpp, every position a token"


def lengths_of(B: int, L: int) -> Tensor:
    """[B], the quantiles of a lognormal distribution, the largest being L, not in order."""
    quantiles = torch.tensor([NormalDist().inv_cdf((i + 0.5) / B) for i in range(B)])
    lengths = torch.exp(SIGMA * (quantiles - quantiles[-1])).mul(L).round().clamp(min=1).long()
    return lengths[torch.randperm(B, generator=torch.Generator().manual_seed(0))]


@dataclass
class Layout:
    mask: Tensor  # [B, L]
    cu_seqlens: Tensor  # [B + 1]

    @classmethod
    def of(cls, B: int, L: int) -> Layout:
        lengths = lengths_of(B, L)
        ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        return cls(torch.arange(L) < lengths[:, None], ends)

    def packed(self, keywords: dict[str, Any]) -> dict[str, Any]:
        """The keywords of a call with tensors [B, L], for the same call with packed ones."""
        rows = {name: value[self.mask] if isinstance(value, Tensor) else value for name, value in keywords.items()}
        return rows | {"cu_seqlens": self.cu_seqlens}


# ---- from hidden states ---------------------------------------------------------------------------------------------


@dataclass
class HiddenInputs:
    """`padded` has gradients of its own; rows [T, H] is a leaf, too."""

    padded: linear_inputs.Inputs
    rows: Tensor
    layout: Layout

    def clear(self) -> None:
        self.padded.clear()
        self.rows.grad = None


def hidden_inputs(B: int, L: int, H: int, V: int, dtype: torch.dtype) -> HiddenInputs:
    padded = linear_inputs.make_inputs(B, L, H, V, dtype, "cpu")
    layout = Layout.of(B, L)
    old, ref = padded.keywords["old_per_token_logps"], padded.keywords["ref_per_token_logps"]
    padded.mask = layout.mask
    padded.batch = cases_loss.loss_batch(padded.ids, padded.advantages, old, ref, layout.mask)
    return HiddenInputs(padded, padded.hidden.detach()[layout.mask].requires_grad_(), layout)


def linear_packed(x: HiddenInputs) -> Call:
    p, keywords = x.padded, x.layout.packed(x.padded.keywords)
    ids = p.ids[x.layout.mask]
    return Call(
        lambda: linear_grpo_loss(x.rows, p.weight, ids, p.advantages, backend="cpp", **keywords).loss.backward(),
        x.clear,
    )


def linear_padded(x: HiddenInputs, **changes: Any) -> Call:
    return cases_linear.ours(x.padded, "cpp", **changes)


def linear_peer(x: HiddenInputs, prepare: Callable[[linear_inputs.Inputs], Call]) -> Call:
    return prepare(x.padded)


def linear_scene(B: int, L: int, H: int, V: int, dtype: torch.dtype) -> Scene:
    tokens = int(lengths_of(B, L).sum())
    work = 6.0 * tokens * H * V
    mine = "mr1fast cpp, packed"

    def case(name: str, prepare: Callable[[HiddenInputs], Call], work: float = work) -> Case:
        return Case(name, prepare, work, "GFLOP/s", None if name == FULL else FULL, mine)

    cases = (
        case(mine, linear_packed),
        case("mr1fast cpp, padded", lambda x: linear_padded(x, completion_mask=x.layout.mask)),
        case(FULL, linear_padded, 6.0 * B * L * H * V),
        case("TRL ChunkedLogProbFunction, unmasked rows", partial(linear_peer, prepare=peers.trl_unmasked)),
        case("TRL ChunkedLogProbFunction, padded", partial(linear_peer, prepare=peers.trl_chunked)),
        case("Liger chunked, padded", partial(linear_peer, prepare=partial(peers.liger, compiled=False))),
        case("logits, then torch eager, padded", partial(linear_peer, prepare=peers.eager)),
    )
    shape = f"{tokens} of {B * L} x {H} x {V}"
    return Scene("packed", shape, _name(dtype), lambda: hidden_inputs(B, L, H, V, dtype), cases)


# ---- from logits ----------------------------------------------------------------------------------------------------


@dataclass
class LogitsInputs:
    padded: cases_loss.Inputs
    source: Tensor  # [T, V]
    rows: Tensor  # [T, V], which the packed case overwrites
    layout: Layout

    def restore(self) -> None:
        self.rows.copy_(self.source)


def logits_inputs(B: int, L: int, V: int, dtype: torch.dtype) -> LogitsInputs:
    padded = cases_loss.make_inputs(B, L, V, dtype, "cpu")
    layout = Layout.of(B, L)
    padded.batch = cases_loss.loss_batch(padded.ids, padded.advantages, padded.old_logps, padded.ref_logps, layout.mask)
    source = padded.source[layout.mask]
    return LogitsInputs(padded, source, source.clone(), layout)


def logits_packed(x: LogitsInputs) -> Call:
    keywords, ids = x.layout.packed(x.padded.keywords()), x.padded.ids[x.layout.mask]

    def run() -> None:
        leaf = cases_loss.model_output(x.rows)
        grpo_loss(leaf, ids, x.padded.advantages, inplace=True, backend="cpp", **keywords).loss.backward()

    return Call(run, x.restore)


def logits_padded(x: LogitsInputs, **changes: Any) -> Call:
    p = x.padded

    def run() -> None:
        keywords = p.keywords() | changes
        grpo_loss(p.leaf(), p.ids, p.advantages, inplace=True, backend="cpp", **keywords).loss.backward()

    return Call(run, p.restore)


def logits_scene(B: int, L: int, V: int, dtype: torch.dtype) -> Scene:
    tokens = int(lengths_of(B, L).sum())
    row = 2.0 * V * dtype.itemsize  # read and written
    mine = "mr1fast cpp, packed"

    def case(name: str, prepare: Callable[[LogitsInputs], Call], rows: int = tokens) -> Case:
        return Case(name, prepare, row * rows, "GB/s", None if name == FULL else FULL, mine)

    cases = (
        case(mine, logits_packed),
        case("mr1fast cpp, padded", lambda x: logits_padded(x, completion_mask=x.layout.mask)),
        case(FULL, logits_padded, B * L),
        case("torch eager, padded", lambda x: cases_loss.eager(x.padded)),
    )
    shape = f"{tokens} of {B * L} x {V}"
    return Scene("packed", shape, _name(dtype), lambda: logits_inputs(B, L, V, dtype), cases)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def scenes(quick: bool) -> list[Scene]:
    shapes = QUICK_SHAPES if quick else SHAPES
    linear = [linear_scene(*shape, dtype) for shape in shapes for dtype in DTYPES]
    return linear + [logits_scene(B, L, V, dtype) for B, L, _, V in shapes for dtype in DTYPES]
