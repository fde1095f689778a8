"""Triton kernels without a GPU: what a call would launch, under which key it would be compiled, and what comes out.

A call of the backend on CPU tensors is recorded instead of launched; so what is compiled here is what a GPU would get,
down to the alignment hints of the arguments. Needs TRITON_INTERPRET unset when triton is imported.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature


class Launch(NamedTuple):
    kernel: Any  # a JITFunction
    grid: tuple[int, ...]
    args: tuple
    options: dict[str, Any]


def recorded_launches(call: Callable[[], object]) -> list[Launch]:
    """The Triton launches of `call`, none of which happens."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1 replaces the compiler; unset it to compile kernels")
    launches: list[Launch] = []

    def record(kernel, *args, grid, warmup, **options):
        launches.append(Launch(kernel, grid, args, {"debug": kernel.debug, **options}))

    with mock.patch.object(JITFunction, "run", record):
        call()
    return launches


def specialisation(launch: Launch, arch: int = 90) -> tuple[Any, dict, dict, dict]:
    """(options, signature, constexprs, attributes): what the compiler sees of a launch."""
    backend = make_backend(GPUTarget("cuda", arch, 32))
    kernel = launch.kernel
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, types, _ = binder(*launch.args, **launch.options)
    return kernel._pack_args(backend, dict(launch.options), bound, types, None)


def specialisation_key(launch: Launch) -> str:
    """Two launches compile once if and only if their keys are equal."""
    options, signature, constexprs, attributes = specialisation(launch)
    return repr(
        (launch.kernel.__name__, options.hash(), signature, sorted(constexprs.items()), sorted(attributes.items()))
    )


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a launch; `loads` maps a width in bytes to how often it stands in the PTX."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    loads: dict[int, int]
    tile_bytes: int  # of the row tiles one thread loads, each load of the source counted once
    int64_offsets: bool  # whether whatever leads to a row, or to a token's value, is 64 bits wide
    loop_shuffles: int  # shuffles between threads within loops, where the walk over a row has none

    @property
    def wide(self) -> bool:
        """Whether every tile is loaded 16 bytes at a time or more."""
        return sum(width * count for width, count in self.loads.items() if width >= 16) >= self.tile_bytes


def compile_offline(launch: Launch, arch: int) -> Compiled:
    """Compile for sm_<arch>, and have ptxas say what it needs."""
    options, signature, constexprs, attributes = specialisation(launch, arch)
    source = ASTSource(launch.kernel, signature, constexprs, attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options.__dict__)
    ptx = kernel.asm["ptx"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        suffix = "a" if arch >= 90 else ""
        command = [get_ptxas(arch).path, "-v", f"--gpu-name=sm_{arch}{suffix}", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return Compiled(
        registers=int(_found(r"Used (\d+) registers", said)),
        spill_bytes=int(_found(r"(\d+) bytes spill stores", said)) + int(_found(r"(\d+) bytes spill loads", said)),
        shared_bytes=kernel.metadata.shared,
        loads=_load_widths(ptx),
        tile_bytes=_tile_bytes(kernel.asm["ttir"], 32 * options.num_warps),
        loop_shuffles=_shuffles_in_loops(ptx),
        int64_offsets=set(re.findall(r"tt\.addptr .* : !tt\.ptr<\w+>, (\w+)", kernel.asm["ttir"])) == {"i64"},
    )


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match, f"{pattern!r} not in {text!r}"
    return match[1]


def _load_widths(ptx: str) -> dict[int, int]:
    """Widths in bytes of the global loads (cp.async included), with their numbers."""
    widths: dict[int, int] = {}
    found = [
        int(vector or 1) * int(bits) // 8
        for vector, bits in re.findall(r"\bld\.global(?:\.[\w:]+)*?(?:\.v(\d+))?\.[bfsu](\d+)\b", ptx)
    ]
    found += [int(width, 16) for width in re.findall(r"cp\.async\.c[ag]\.shared\.global\S* [^;]*?, 0x(\w+)", ptx)]
    for width in sorted(found, reverse=True):
        widths[width] = widths.get(width, 0) + 1
    return widths


def _tile_bytes(ttir: str, threads: int) -> int:
    """Bytes a thread loads by the loads of row tiles, which are those of more than one dimension."""
    total = 0
    for sizes, bits in re.findall(r"tt\.load .*: tensor<((?:\d+x){2,})!tt\.ptr<[a-z]+(\d+)>", ttir):
        total += math.prod(map(int, sizes.split("x")[:-1])) * int(bits) // 8 // threads
    return total


def _shuffles_in_loops(ptx: str) -> int:
    """Shuffles in the walk over a row: between a label and a later jump back to it, beside loads of 16 bytes."""
    lines = ptx.splitlines()
    labels = {match[1]: i for i, line in enumerate(lines) if (match := re.match(r"\s*(\$\S+):", line))}
    inside: set[int] = set()
    for i, line in enumerate(lines):
        jump = re.search(r"\bbra(?:\.uni)?\s+(\$\w+)", line)
        start = labels.get(jump[1], i) if jump else i
        if any(width >= 16 for width in _load_widths("\n".join(lines[start:i]))):
            inside.update(range(start, i))
    return sum("shfl.sync" in lines[i] for i in inside)
