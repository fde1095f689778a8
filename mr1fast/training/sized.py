"""Tensors that have a shape and no numbers, and a count of the bytes that they would take.

torch's FakeTensorMode and MemTracker do this for any program, but take about half a millisecond for each operation,
which makes a minute of one step of Qwen2-VL-2B, and have no numbers at all. Here, what an operation returns is looked
up by the shapes of its arguments, because the layers of a model are alike; and ids, masks and positions keep their
numbers, so that whatever depends on these (`unique`, `nonzero`, `tolist`) runs as usual.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

# A tensor with more numbers than these loses them, unless they are ids: attention masks would take their time.
_MOST_NUMBERS = 2**20
_FACTORIES = {aten.empty.memory_format, aten.zeros.default, aten.ones.default}
# What `item()` returns where there is no number: finite, and true.
_ANSWERS = {torch.bool: True, torch.int64: 1, torch.int32: 1}


class Memory:
    """Bytes that are counted under a category for as long as a tensor refers to them."""

    def __init__(self, held: Counter[str], category: str, size: int):
        self.held, self.category, self.size = held, category, size
        held[category] += size

    def label(self, category: str) -> None:
        self.held[self.category] -= self.size
        self.held[category] += self.size
        self.category = category

    def __del__(self) -> None:
        self.held[self.category] -= self.size


class Sized(torch.Tensor):
    """A tensor on the CPU without numbers; tensors that share memory have the same `memory`."""

    memory: Memory

    @staticmethod
    def __new__(cls, like: _Shape, memory: Memory) -> Sized:
        sized = torch.Tensor._make_wrapper_subclass(cls, like.size, strides=like.strides, dtype=like.dtype)
        sized.memory = memory
        return sized

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        raise NotImplementedError(f"{func} on a tensor without numbers, outside of a MemoryTracker")

    def __repr__(self, *, tensor_contents=None) -> str:  # type: ignore[override]
        return f"Sized({list(self.shape)}, dtype={self.dtype})"


class _Shape(NamedTuple):
    """Of a tensor that an operation returns."""

    size: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    source: int | None  # the place among its tensors of the one whose memory this is; None for new memory
    is_source: bool  # whether it is the very tensor, which the operation has changed in place


class MemoryTracker(TorchDispatchMode):
    """While it is active, operations on `Sized` tensors return `Sized` ones, and all bytes are counted.

    opened: operations in whose place a function is called, so that what it allocates is seen. skipped: the namespace
    of operations that return nothing. vocabulary: tensors [..., vocabulary] are logits.
    """

    # What operations return, by the shapes of their arguments; plans of one model have most of them in common.
    _found: ClassVar[dict[Any, Any]] = {}

    def __init__(self, *, opened: dict[Any, Callable], skipped: str, vocabulary: int):
        super().__init__()
        self.opened, self.skipped, self.vocabulary = opened, skipped, vocabulary
        self.held: Counter[str] = Counter()  # bytes by category, at this moment
        self.peaks: dict[str, Counter[str]] = {}  # of each phase: what was held when it was most
        self._phase, self._rest = "", "activations"
        self._real: dict[int, tuple[weakref.ref, Memory]] = {}  # of tensors with numbers, by the key of their storage

    def begin(self, phase: str, rest: str = "activations") -> None:
        """From now on it is this phase, in which memory that is not labelled is of the category `rest`."""
        self._phase, self._rest = phase, rest
        self.peaks[phase] = self.held.copy()

    def label(self, tensors: Iterable[Tensor | None], category: str) -> None:
        """Say what the memory of these tensors is for."""
        for tensor in tensors:
            if tensor is not None:
                self._memory_of(tensor).label(category)

    def take_numbers(self, model: nn.Module, category: str) -> None:
        """Make the weights and buffers of a model, which are on the meta device, `Sized`."""
        made: dict[int, Any] = {}  # tied weights stay one

        def sized(tensor: Tensor) -> Any:
            if id(tensor) not in made:
                found = Sized(_shape_of(tensor.detach(), ()), self._new(tensor.nbytes, category))
                made[id(tensor)] = (
                    nn.Parameter(found, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else found
                )
            return made[id(tensor)]

        with self:
            for module in model.modules():
                for tensors in (module._parameters, module._buffers):
                    tensors.update({name: sized(tensor) for name, tensor in tensors.items() if tensor is not None})

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self.opened:
            with self:
                return self.opened[func](*args, **kwargs)
        if func.namespace == self.skipped:
            return None
        tensors = list(_tensors((*args, *kwargs.values())))
        if any(isinstance(tensor, Sized) for tensor in tensors):
            if func is aten._local_scalar_dense.default:
                return _ANSWERS.get(tensors[0].dtype, 1.0)
            return self._run_on_shapes(func, args, kwargs, tensors)
        if _is_large(func, args, tensors):
            return self._run_on_shapes(func, args, kwargs, tensors)
        found = func(*args, **kwargs)
        for tensor in _tensors((found,)):
            self._memory_of(tensor)
        return found

    def _run_on_shapes(self, func: Any, args: tuple, kwargs: dict[str, Any], tensors: list[Tensor]) -> Any:
        """What the operation returns, `Sized`; an argument that it changes in place comes back as the object it is."""
        key = (func, _key(args), *((name, _key(value)) for name, value in kwargs.items()))
        if key not in self._found:
            self._found[key] = _shapes_of(func, args, kwargs, tensors)

        def sized(shape: Any) -> Any:
            if not isinstance(shape, _Shape):
                return shape
            if shape.source is None:
                logits = len(shape.size) > 1 and shape.size[-1] == self.vocabulary and self._rest == "activations"
                return Sized(shape, self._new(shape.nbytes, "logits" if logits else self._rest))
            source = tensors[shape.source]
            return source if shape.is_source else Sized(shape, self._memory_of(source))

        return _map(sized, self._found[key], _Shape)

    def _new(self, size: int, category: str) -> Memory:
        memory = Memory(self.held, category, size)
        if self._phase and self.held.total() > self.peaks[self._phase].total():
            self.peaks[self._phase] = self.held.copy()
        return memory

    def _memory_of(self, tensor: Tensor) -> Memory:
        """One with numbers is counted from now on."""
        if isinstance(tensor, Sized):
            return tensor.memory
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._real:
            freed = weakref.ref(storage, lambda _: self._real.pop(key))
            self._real[key] = freed, self._new(storage.nbytes(), self._rest)
        return self._real[key][1]


def _is_large(func: Any, args: tuple, tensors: list[Tensor]) -> bool:
    """Whether numbers are given up from here on. Not for a view, which takes no memory of its own."""
    if func in _FACTORIES:
        return math.prod(args[0]) > _MOST_NUMBERS
    return not func.is_view and any(t.dtype != torch.int64 and t.numel() > _MOST_NUMBERS for t in tensors)


def _shapes_of(func: Any, args: tuple, kwargs: dict[str, Any], tensors: list[Tensor]) -> Any:
    """What the operation returns, with a _Shape in the place of each tensor."""
    metas = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in tensors]
    rest = iter(metas)

    def on_meta(value: Any) -> Any:
        if isinstance(value, Tensor):
            return next(rest)
        if isinstance(value, torch.device):
            return torch.device("meta")
        return None if isinstance(value, torch.Generator) else value

    inner, keywords = _map(on_meta, args), {name: _map(on_meta, value) for name, value in kwargs.items()}
    if func in _FACTORIES:
        keywords["device"] = torch.device("meta")
    found = func(*inner, **keywords)
    return _map(lambda value: _shape_of(value, metas) if isinstance(value, Tensor) else value, found)


def _shape_of(found: Tensor, metas: Iterable[Tensor]) -> _Shape:
    storage = found.untyped_storage()
    same = [i for i, meta in enumerate(metas) if meta is found]
    source = same or [i for i, meta in enumerate(metas) if meta.untyped_storage()._cdata == storage._cdata]
    return _Shape(
        found.size(), found.stride(), found.dtype, storage.nbytes(), source[0] if source else None, bool(same)
    )


# ---- nested arguments -----------------------------------------------------------------------------------------------


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _map(function: Callable, value: Any, leaf: type | tuple[type, ...] = ()) -> Any:
    if isinstance(value, list | tuple) and not isinstance(value, leaf):
        return type(value)([_map(function, one, leaf) for one in value])
    return function(value)


def _key(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.size(), value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(map(_key, value))
    return type(value), value  # 1, 1.0 and True are equal, and give other dtypes
