"""`python -m benchmarks.compile_check_cuda`: compile csrc/grpo_cuda.cu without a GPU, and see what the kernels need.

For sm_80, sm_90a and sm_100a; prints registers and spills. Exits 1 if a kernel spills or keeps anything in local
memory, 2 where there is no nvcc.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from mr1fast.kernels import cuda_build

ARCHITECTURES = ("80", "90a", "100a")


class Kernel(NamedTuple):
    name: str
    arch: str
    registers: int
    stack: int  # bytes a thread, in local memory
    spills: int  # bytes


def kernels(arch: str) -> list[Kernel]:
    """What ptxas says of every kernel compiled for that architecture. Raises CannotBuild."""
    nvcc = cuda_build.find_nvcc()
    if nvcc is None:
        raise cuda_build.CannotBuild("nvcc was not found (CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda)")
    with tempfile.TemporaryDirectory() as folder:
        command = [*cuda_build.compile_command(nvcc, arch, Path(folder) / "grpo_cuda.so"), "-Xptxas", "-v"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise cuda_build.CannotBuild(f"nvcc failed for sm_{arch}:\n{done.stderr}")
    pattern = (
        r"Compiling entry function '(\S+)'[\s\S]*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads[\s\S]*?Used (\d+) registers"
    )
    return [
        Kernel(readable(name), arch, int(registers), int(stack), int(stores) + int(loads))
        for name, stack, stores, loads, registers in re.findall(pattern, done.stderr)
    ]


def readable(mangled: str) -> str:
    """ "rows_fwd_kernel<bfloat16, no gradient, soft cap>" from a mangled name."""
    name = re.search(r"\d+([a-z_]+_kernel)(I)?", mangled)
    assert name, mangled
    if not name[2]:
        return name[1]
    dtype = "bfloat16" if "BFloat16" in mangled else "float16" if "Float16" in mangled else "float32"
    *gradient, cap = (flag == "1" for flag in re.findall(r"Lb([01])E", mangled))
    words = [dtype] + ["gradient" if flag else "no gradient" for flag in gradient] + ["soft cap"] * cap
    return f"{name[1]}<{', '.join(words)}>"


def main() -> int:
    argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0]).parse_args()
    try:
        with ThreadPoolExecutor(2) as pool:
            found = [kernel for arch in pool.map(kernels, ARCHITECTURES) for kernel in arch]
    except cuda_build.CannotBuild as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{'kernel':45}{'for':9}{'registers':>10}{'stack':>7}{'spills':>8}")
    for kernel in sorted(found, key=lambda kernel: kernel.name):
        wrong = "  SPILLS" if kernel.spills or kernel.stack else ""
        print(f"{kernel.name:45}sm_{kernel.arch:6}{kernel.registers:10}{kernel.stack:7}{kernel.spills:8}{wrong}")
    good = not any(kernel.spills or kernel.stack for kernel in found)
    print("no spills, nothing in local memory" if good else "FAILED: see SPILLS above")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
