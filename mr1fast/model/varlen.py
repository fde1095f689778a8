"""Attention over the segments of a row: kernels, and how two of their calls share a prefix.

Shapes: query [T, heads, D]; key and value [T', groups, D], of fewer heads where queries are grouped. A kernel returns
the output [T, heads, D] and its log-sum-exp [T, heads] (float32, or float64). By these the outputs of two calls on
disjoint keys are merged; and given the merged ones, backward of each call returns its exact share of the gradient, as
in ring attention. So the keys and values of a prompt are read where they lie, by all of its completions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mr1fast.model.segments import Segments

aten = torch.ops.aten
Found = tuple[Tensor, Tensor]  # output, log-sum-exp
Gradients = tuple[Tensor, Tensor, Tensor]  # of query, key and value


class Kernel(NamedTuple):
    """name: as users see it. why_not: of device and dtype; a sentence where it cannot run.

    forward(query, key, value, segments, scale) -> Found
    backward(grad, query, key, value, output, log-sum-exp, segments, scale) -> Gradients
    """

    name: str
    why_not: Callable[[torch.device, torch.dtype], str | None]
    forward: Callable[..., Found]
    backward: Callable[..., Gradients]


# ---- kernels that take segments as they are -------------------------------------------------------------------------


def _flash_forward(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float) -> Found:
    # What torch.nn.attention.varlen.varlen_attn calls; its own backward could not be given another log-sum-exp.
    out, lse, *_ = aten._flash_attention_forward(
        query, key, value, *segments.bounds, 0.0, segments.causal, False, scale=scale
    )
    return out, lse.t()


def _flash_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    segments: Segments,
    scale: float,
) -> Gradients:
    random_state = torch.zeros(2, dtype=torch.uint64, device=query.device)  # of dropout, which there is none of
    return aten._flash_attention_backward(
        grad.contiguous(),
        query,
        key,
        value,
        out.contiguous(),
        lse.t().contiguous(),
        *segments.bounds,
        0.0,
        segments.causal,
        random_state,
        random_state.new_empty(0),
        scale=scale,
    )


def _not_flash(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return "it needs a CUDA device"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it does not take {dtype}"
    return None if torch.cuda.get_device_capability(device) >= (8, 0) else "it needs compute capability 8.0"


# ---- kernels that take rectangles [n, heads, L, D] ------------------------------------------------------------------


def _forward_by(attend: Callable[..., Found]) -> Callable[..., Found]:
    def forward(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float) -> Found:
        out = torch.empty_like(query)
        lse = query.new_empty(query.shape[:2], dtype=torch.promote_types(query.dtype, torch.float32))
        for queries, keys in segments.rectangles:
            q, k, v = (at.take(rows).transpose(1, 2) for at, rows in ((queries, query), (keys, key), (keys, value)))
            found, total = attend(q, k, v, segments.causal, scale)
            queries.put(found.transpose(1, 2), out)
            queries.put(total.transpose(1, 2), lse)
        return out, lse

    return forward


def _backward_by(differentiate: Callable[..., Gradients]) -> Callable[..., Gradients]:
    def backward(
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        segments: Segments,
        scale: float,
    ) -> Gradients:
        # A key that no query sees is in no rectangle.
        gradients = [torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)]
        for queries, keys in segments.rectangles:
            of_queries = [queries.take(rows).transpose(1, 2) for rows in (grad, query, out)]
            k, v = (keys.take(rows).transpose(1, 2) for rows in (key, value))
            total = queries.take(lse)
            if queries.padding is not None:  # whose probabilities, and so gradients, are 0
                total = total.masked_fill(queries.padding[..., None], torch.inf)
            found = differentiate(*of_queries, k, v, total.transpose(1, 2), segments.causal, scale)
            for at, values, rows in zip((queries, keys, keys), found, gradients):
                at.put(values.transpose(1, 2), rows)
        return gradients[0], gradients[1], gradients[2]

    return backward


def _sdpa_attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Found:
    """What scaled_dot_product_attention calls on a CPU, which takes grouped queries as they are."""
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


def _sdpa_differentiate(
    grad: Tensor, q: Tensor, out: Tensor, k: Tensor, v: Tensor, lse: Tensor, causal: bool, scale: float
) -> Gradients:
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, causal, scale=scale)


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    """[n, groups, heads / groups, Lq, Lk], at least float32."""
    q = q.unflatten(1, (k.shape[1], -1))
    scores = (q @ k[:, :, None].mT).to(torch.promote_types(q.dtype, torch.float32)) * scale
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(hidden, -torch.inf) if causal else scores


def _eager_attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Found:
    scores = _scores(q, k, causal, scale)
    lse = scores.logsumexp(-1)
    out = (scores - lse[..., None]).exp().to(v.dtype) @ v[:, :, None]
    return out.flatten(1, 2), lse.flatten(1, 2)


def _eager_differentiate(
    grad: Tensor, q: Tensor, out: Tensor, k: Tensor, v: Tensor, lse: Tensor, causal: bool, scale: float
) -> Gradients:
    groups = (k.shape[1], -1)
    p = (_scores(q, k, causal, scale) - lse.unflatten(1, groups)[..., None]).exp()
    delta = (grad * out).sum(-1, dtype=p.dtype).unflatten(1, groups)
    grad, q = grad.unflatten(1, groups), q.unflatten(1, groups)
    dv = (p.to(grad.dtype).mT @ grad).sum(2)
    ds = (p * ((grad @ v[:, :, None].mT) - delta[..., None]) * scale).to(q.dtype)
    return (ds @ k[:, :, None]).flatten(1, 2), (ds.mT @ q).sum(2), dv


KERNELS = (
    Kernel("PyTorch's FlashAttention", _not_flash, _flash_forward, _flash_backward),
    Kernel(
        "PyTorch's attention on a CPU",
        lambda device, _: None if device.type == "cpu" else "it needs a CPU",
        _forward_by(_sdpa_attend),
        _backward_by(_sdpa_differentiate),
    ),
    Kernel("eager attention", lambda *_: None, _forward_by(_eager_attend), _backward_by(_eager_differentiate)),
)


def kernel_for(device: torch.device, dtype: torch.dtype, *, eager: bool = False) -> Kernel:
    """The first that can run; eager: the last."""
    return KERNELS[-1] if eager else next(one for one in KERNELS if one.why_not(device, dtype) is None)


# ---- attention ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SharedPrefix:
    """A row of `shared` tokens of prompts, and then of their completions.

    itself: each prompt and each completion on itself. on_prompts: the completions of each prompt, all as one segment,
    on their prompt; None where there are none. prompts: the prompts' keys and values [T', groups, D] of each layer if
    they have run before and are not in the row.
    """

    shared: int
    itself: Segments
    on_prompts: Segments | None = None
    prompts: list[tuple[Tensor, Tensor]] | None = None
    _images: dict[tuple[int, ...], Segments] = field(default_factory=dict)

    def images(self, lengths: tuple[int, ...], device: torch.device) -> Segments:
        """Images, or windows in them, each on itself: all layers of the vision tower have the same, or one of two."""
        if lengths not in self._images:
            self._images[lengths] = Segments(lengths, causal=False, device=device)
        return self._images[lengths]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: SharedPrefix,
    kernel: Kernel,
    scale: float,
    layer: int | None = None,
) -> Tensor:
    """Output [T, heads, D] of a row; differentiable, once. layer: where the layout has the prompts of each."""
    before: tuple[Tensor | None, Tensor | None] = None, None
    if layout.prompts is not None:
        assert layer is not None, "prompts that have run before are found by the layer"
        before = layout.prompts[layer]
    return _Attention.apply(query, key, value, *before, layout, kernel, scale)


class _Attention(torch.autograd.Function):
    """The prompts' keys and values are the first of the row, or those of a row before: `before`."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_before: Tensor | None,
        value_before: Tensor | None,
        layout: SharedPrefix,
        kernel: Kernel,
        scale: float,
    ) -> Tensor:
        out, lse = kernel.forward(query, key, value, layout.itself, scale)
        if layout.on_prompts is not None:
            N = layout.shared
            prompts = _prompts(N, key, value, key_before, value_before)
            other, other_lse = kernel.forward(query[N:], *prompts, layout.on_prompts, scale)
            total = torch.logaddexp(lse[N:], other_lse)
            share, other_share = ((part - total).exp()[..., None] for part in (lse[N:], other_lse))
            out[N:] = share * out[N:] + other_share * other
            lse[N:] = total
        ctx.save_for_backward(query, key, value, key_before, value_before, out, lse)
        ctx.layout, ctx.kernel, ctx.scale = layout, kernel, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, key_before, value_before, out, lse = ctx.saved_tensors
        layout, kernel, scale = ctx.layout, ctx.kernel, ctx.scale
        dq, dk, dv = kernel.backward(grad, query, key, value, out, lse, layout.itself, scale)
        dk_before = dv_before = None
        if layout.on_prompts is not None:
            N = layout.shared
            prompts = _prompts(N, key, value, key_before, value_before)
            dq_other, dk_other, dv_other = kernel.backward(
                grad[N:], query[N:], *prompts, out[N:], lse[N:], layout.on_prompts, scale
            )
            dq[N:] += dq_other
            if key_before is None:
                dk[:N] += dk_other
                dv[:N] += dv_other
            else:
                dk_before, dv_before = dk_other, dv_other
        return dq, dk, dv, dk_before, dv_before, None, None, None


def _prompts(
    N: int, key: Tensor, value: Tensor, key_before: Tensor | None, value_before: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Keys and values of the prompts."""
    if key_before is None or value_before is None:
        return key[:N], value[:N]
    return key_before, value_before
