"""How the tokens of a call lie: [B, L], or S completions one after the other (packed) in [T] or [1, T].

Beyond this file there is only [B, L]: packed tensors are [1, T] there, with `cu_seqlens` beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mr1fast.checks import described
from mr1fast.kernels.completions import Completions

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Layout(NamedTuple):
    """The form of a call's tensors: how each is brought from it into [B, L], and results back."""

    shape: tuple[int, ...]  # (B, L), or (1, T)
    token_shapes: list[tuple[int, ...]]  # that a value for each token may have: [shape], or [(T,), (1, T)]
    cu_seqlens: Tensor | None
    completions: Completions
    device: torch.device
    hint: str  # for messages: beside which packed tensor the others stand, or nothing

    def per_token(self, name: str, tensor: Any) -> Tensor:
        """A tensor with a value for each token, as [B, L]."""
        checked = shaped(name, tensor, self.token_shapes, self.device, self.hint)
        return checked if checked.dim() == 2 else checked.unsqueeze(0)

    def per_token_or_completion(self, name: str, tensor: Any, *also: tuple[int, ...]) -> Tensor:
        """A tensor with a value for each token or for each completion, as [B, L]: a view where there is one.

        `also`: shapes that it may have besides, which broadcast to [B, L].
        """
        shapes = [(self.completions.size,), *self.token_shapes, *also]
        checked = shaped(name, tensor, shapes, self.device, self.hint)
        if self.is_per_completion(checked):
            checked = self.completions.spread(checked)
        return checked if checked.shape == self.shape else checked.expand(*self.shape)

    def per_completion(self, name: str, tensor: Any) -> Tensor:
        return shaped(name, tensor, [(self.completions.size,)], self.device, self.hint)

    def is_per_completion(self, tensor: Tensor) -> bool:
        return tensor.shape == (self.completions.size,)

    def returned(self, result: Tensor) -> Tensor:
        """A result, 0-d or [B, L], as the caller gets it: packed as [T]."""
        return result.squeeze(0) if self.packed and result.dim() == 2 else result

    @property
    def packed(self) -> bool:
        return len(self.token_shapes) > 1


def layout_of(
    name: str, tensor: Any, *last: str, cu_seqlens: Any = None, needs_cu_seqlens: bool = True
) -> tuple[Tensor, Layout]:
    """A call's main tensor as [B, L, *last], and the layout of the call.

    With cu_seqlens it must be [T, *last] or [1, T, *last], without [B, L, *last]; or also [T, *last], where nothing
    depends on which tokens form a completion.
    """
    is_flat = isinstance(tensor, Tensor) and tensor.dim() == 1 + len(last)
    if is_flat and (cu_seqlens is not None or not needs_cu_seqlens):
        tensor = floating(name, tensor, "T", *last).unsqueeze(0)
    elif is_flat:
        floating(name, tensor, "B", "L", *last, hint=f"; packed, {_dims('T', *last)}, it needs cu_seqlens")
    else:
        floating(name, tensor, "B", "L", *last)
    shape, device = tensor.shape[:2], tensor.device
    if not is_flat and cu_seqlens is None:
        return tensor, Layout(shape, [shape], None, Completions(*shape), device, "")
    if cu_seqlens is not None:
        if shape[0] != 1:
            wanted = f"{_dims('T', *last)} (or [1, T, ...])"
            raise ValueError(f"{name} must be {wanted} with cu_seqlens, got {list(tensor.shape)}")
        check_cu_seqlens(cu_seqlens, shape[1], device)
    completions = Completions.of(shape, cu_seqlens)
    return tensor, Layout(shape, [shape[1:], shape], cu_seqlens, completions, device, f" beside packed {name}")


def _dims(*names: str) -> str:
    return f"[{', '.join(names)}]"


def check_cu_seqlens(cu_seqlens: Any, T: int, device: torch.device) -> None:
    """Check for offsets [S + 1] of packed completions with T tokens in all, on that device."""
    is_vector = isinstance(cu_seqlens, Tensor) and cu_seqlens.dim() == 1 and cu_seqlens.shape[0] > 0
    if not is_vector or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{_cu_seqlens_must(T)}, got {described(cu_seqlens)}")
    if cu_seqlens.device != device:
        raise ValueError(f"cu_seqlens must be on {device} like the tokens, got {cu_seqlens.device}")
    if torch.compiler.is_compiling():
        return
    if cu_seqlens.is_cuda:  # the CPU does not wait for its values: a device-side assert, as for ids
        fits = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == T) & (cu_seqlens.diff() >= 0).all()
        torch._assert_async(fits, _cu_seqlens_must(T))
        return
    values = cu_seqlens.tolist()
    if values[0] != 0 or values[-1] != T or values != sorted(values):
        shown = ", ".join(map(str, values[:8])) + (f", ..., {values[-1]}" if len(values) > 8 else "")
        raise ValueError(f"{_cu_seqlens_must(T)}, got [{shown}]")


def check_values(name: str, good: Tensor, must: str, values: Tensor) -> None:
    """Check that all of `values` are `good`, where that can be known: as for cu_seqlens above."""
    if torch.compiler.is_compiling():
        return
    if good.is_cuda:
        torch._assert_async(good.all(), f"{name} must be {must}")
    elif not good.all():
        raise ValueError(f"{name} must be {must}, got {values[~good][0].item()} ({int((~good).sum())} such value(s))")


def _cu_seqlens_must(T: int) -> str:  # written only where it is needed: a size in a text is a constant to torch.compile
    return (
        "cu_seqlens must be an int32 or int64 tensor [S + 1] that starts at 0, never decreases and ends at the number "
        f"of tokens ({T})"
    )


def floating(name: str, tensor: Any, *dims: str, hint: str = "") -> Tensor:
    """Check for a floating-point tensor with these dimensions, e.g. "B", "L", "V"."""
    if not isinstance(tensor, Tensor) or tensor.dim() != len(dims) or tensor.dtype not in FLOAT_DTYPES:
        kind = f"float32, bfloat16, float16 or float64 tensor {_dims(*dims)}"
        raise ValueError(f"{name} must be a {kind}, got {described(tensor)}{hint}")
    return tensor


def shaped(
    name: str, tensor: Any, shapes: Sequence[tuple[int, ...]], device: torch.device | None, hint: str = ""
) -> Tensor:
    """Check that `tensor` has one of the shapes and is on the device; hint: why it must have them."""
    # `in` is fast; torch.compile answers it wrongly where sizes are symbols and the shapes have several lengths.
    if not isinstance(tensor, Tensor) or not (tensor.shape in shapes or any(tensor.shape == each for each in shapes)):
        wanted = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        raise ValueError(f"{name} must be a tensor of shape {wanted}{hint}, got {described(tensor)}")
    if tensor.is_complex():
        raise ValueError(f"{name} must be real, got {described(tensor)}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} must be on {device} like the logits, got {tensor.device}")
    return tensor
