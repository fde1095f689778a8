"""Tensors that have a shape and no numbers, and a count of the bytes that they would take.

torch's FakeTensorMode and MemTracker do this for any program, but take about half a millisecond for each operation,
which makes a minute of one step of Qwen2-VL-2B. Here, what an operation gives is remembered by the shapes of its
arguments, because the layers of a model are alike. And ids, masks and positions keep their numbers, so that what
depends on these (`unique`, `nonzero`, `tolist`) runs as it is.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

# More numbers than these are not computed, unless they are ids: attention masks and pixels would take their time.
_MOST_NUMBERS = 2**20
_FACTORIES = {aten.empty.memory_format, aten.zeros.default, aten.ones.default}
# What `item()` answers where there is no number: finite, and true.
_ANSWERS = {torch.bool: True, torch.int64: 1, torch.int32: 1}


class Sized(torch.Tensor):
    """A tensor on the CPU without numbers. `meta` is one on torch's meta device, whose storage knows its size."""

    meta: Tensor

    @staticmethod
    def __new__(cls, meta: Tensor) -> Sized:
        sized = torch.Tensor._make_wrapper_subclass(
            cls, meta.size(), strides=meta.stride(), storage_offset=meta.storage_offset(), dtype=meta.dtype
        )
        sized.meta = meta
        return sized

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        if func is aten.detach.default:  # nn.Parameter asks for it
            return cls(args[0].meta.detach())
        raise NotImplementedError(f"{func} on a tensor without numbers, outside of a MemoryTracker")

    def __repr__(self, *, tensor_contents=None) -> str:  # type: ignore[override]
        return f"Sized({list(self.shape)}, dtype={self.dtype})"


def without_numbers(model: nn.Module) -> None:
    """Make the weights and buffers of a model, which are on the meta device, `Sized`."""
    made: dict[int, nn.Parameter] = {}  # tied weights stay one
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                if id(weight) not in made:
                    made[id(weight)] = nn.Parameter(Sized(weight.detach()), weight.requires_grad)
                module._parameters[name] = made[id(weight)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = Sized(buffer)


class MemoryTracker(TorchDispatchMode):
    """While it is active, operations on `Sized` tensors give `Sized` ones; all bytes are counted until they are freed.

    opened: operations in whose place a function is called, the allocations of which are seen as well. skipped: the
    namespace of operations that return nothing. vocabulary: tensors [..., vocabulary] are logits.
    """

    def __init__(self, *, opened: dict[Any, Callable], skipped: str, vocabulary: int):
        super().__init__()
        self.opened, self.skipped, self.vocabulary = opened, skipped, vocabulary
        self.held: Counter[str] = Counter()  # bytes by category, at this moment
        self.peaks: dict[str, Counter[str]] = {}  # of each phase: what was held when it was most
        self._phase, self._rest = "", "activations"
        self._category: dict[int, str] = {}  # by storage
        self._alive: dict[int, weakref.ref] = {}

    def begin(self, phase: str, rest: str = "activations") -> None:
        """From now on it is this phase, in which memory that is not labelled is of the category `rest`."""
        self._phase, self._rest = phase, rest
        self.peaks[phase] = self.held.copy()

    def label(self, tensors: Iterable[Tensor | None], category: str) -> None:
        """Say what the memory of these tensors is for."""
        for tensor in tensors:
            if tensor is not None:
                storage, size = self._count(tensor)
                self.held[self._category[storage]] -= size
                self.held[category] += size
                self._category[storage] = category

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self.opened:
            with self:
                return self.opened[func](*args, **kwargs)
        if func.namespace == self.skipped:
            return None
        tensors = [*_tensors(args), *_tensors(tuple(kwargs.values()))]
        real = [tensor for tensor in tensors if not isinstance(tensor, Sized)]
        if func is aten._local_scalar_dense.default and not real:
            return _ANSWERS.get(tensors[0].dtype, 1.0)
        for tensor in real:
            self._count(tensor)
        large = any(map(_is_large, real)) and not func.is_view  # a view takes no memory of its own
        large |= func in _FACTORIES and math.prod(args[0]) > _MOST_NUMBERS
        if large or len(real) < len(tensors):
            found = _run_on_shapes(func, args, kwargs, tensors)
        else:
            found = func(*args, **kwargs)
        for tensor in _tensors((found,)):
            self._count(tensor)
        return found

    def _count(self, tensor: Tensor) -> tuple[int, int]:
        """Count the tensor's storage, if it is new, until it is freed. Returns its key and its bytes."""
        storage = (tensor.meta if isinstance(tensor, Sized) else tensor).untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive:
            is_logits = tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary and self._rest == "activations"

            def freed(_: weakref.ref, key: int = key, size: int = size) -> None:
                del self._alive[key]
                self.held[self._category.pop(key)] -= size

            self._alive[key] = weakref.ref(storage, freed)
            self._category[key] = "logits" if is_logits else self._rest
            self.held[self._category[key]] += size
            if self._phase and self.held.total() > self.peaks[self._phase].total():
                self.peaks[self._phase] = self.held.copy()
        return key, size


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _is_large(tensor: Tensor) -> bool:
    return tensor.dtype != torch.int64 and tensor.numel() > _MOST_NUMBERS


# ---- operations on shapes -------------------------------------------------------------------------------------------

# By operation and shapes: (number of the argument that comes back, or None; size, strides and dtype of what does).
_RESULTS: dict[Any, tuple[int | None, torch.Size, tuple[int, ...], torch.dtype]] = {}


def _run_on_shapes(func: Any, args: tuple, kwargs: dict[str, Any], tensors: list[Tensor]) -> Any:
    """What the operation gives, `Sized`; an argument that it changes in place comes back as the object that it is."""
    key = (func, _key(args), *((name, _key(value)) for name, value in kwargs.items()))
    if key in _RESULTS:
        source, size, strides, dtype = _RESULTS[key]
        if source is not None:
            return tensors[source]
        return Sized(torch.empty_strided(size, strides, dtype=dtype, device="meta"))

    metas = [tensor.meta if isinstance(tensor, Sized) else tensor.to("meta") for tensor in tensors]
    rest = iter(metas)
    inner, keywords = _on_meta(args, rest), {name: _on_meta((value,), rest)[0] for name, value in kwargs.items()}
    if func in _FACTORIES:
        keywords["device"] = torch.device("meta")
    found = func(*inner, **keywords)

    def wrapped(result: Any) -> Any:
        if not isinstance(result, Tensor):
            return result
        source = next((i for i, meta in enumerate(metas) if meta is result), None)
        return Sized(result) if source is None else tensors[source]

    if isinstance(found, list | tuple):
        return type(found)(map(wrapped, found))
    if isinstance(found, Tensor):
        source = next((i for i, meta in enumerate(metas) if meta is found), None)
        is_view = any(found.untyped_storage()._cdata == meta.untyped_storage()._cdata for meta in metas)
        if source is not None or not is_view:
            _RESULTS[key] = (source, found.size(), found.stride(), found.dtype)
    return wrapped(found)


def _key(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.size(), value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(map(_key, value))
    return type(value), value  # 1, 1.0 and True are equal, and give other dtypes


def _on_meta(values: Sequence[Any], metas: Iterator[Tensor]) -> list[Any]:
    """Arguments of an operation with these tensors in the place of theirs."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(next(metas))
        elif isinstance(value, list | tuple):
            found.append(_on_meta(value, metas))
        elif isinstance(value, torch.device):
            found.append(torch.device("meta"))
        else:
            found.append(None if isinstance(value, torch.Generator) else value)
    return found
