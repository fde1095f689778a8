"""Where the CUDA kernels come from: nvcc compiles csrc/grpo_cuda.cu once, and a check on the device decides.

nvcc is not tied to the build of torch, so it is looked for here: CUDA_HOME, CUDA_PATH, the PATH, /usr/local/cuda. The
library includes nothing of torch and serves any; it is kept in MR1FAST_CACHE (default ~/.cache/mr1fast), under a name
made of the machine, the architecture, nvcc's version and the sources. Before it gets there it runs against the
reference in a process of its own (cuda_check.py), so that a kernel that a device or driver does not take costs a
warning and not a training run. Where the device takes no second process, the check is skipped, once, with a sentence.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = (
    *("grpo_cuda.cu", "grpo_cuda.h", "cuda_cluster.cuh", "cuda_two_phase.cuh", "cuda_token.cuh", "cuda_primitives.h"),
    *("split_row.h", "token_loss.h", "half.h"),
)
FLAGS = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-shared")
CHECK_SECONDS = 300
NOT_CHECKED = 75  # cuda_check's exit code if the device accepted no second process


class CannotBuild(Exception):
    """The message says in one sentence why there is no library."""


def source_folder() -> Path:
    """csrc/, which is beside kernels/: at the top of a checkout, and inside the package in an installation."""
    return Path(__file__).resolve().parents[1] / "csrc"


@functools.cache
def find_nvcc() -> str | None:
    folders = [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders += [Path(folder) for folder in os.get_exec_path()]
    folders += [Path("/usr/local/cuda/bin"), *sorted(Path("/usr/local").glob("cuda-*/bin"), reverse=True)]
    return next((found for folder in folders if (found := shutil.which("nvcc", path=str(folder)))), None)


def architecture(major: int, minor: int) -> str:
    """nvcc's name for a compute capability; from 9.0 on with the suffix that allows instructions specific to it."""
    return f"{major}{minor}a" if major >= 9 else f"{major}{minor}"


def compile_command(nvcc: str, arch: str, output: Path) -> list[str]:
    target = f"arch=compute_{arch},code=sm_{arch}"
    return [nvcc, *FLAGS, "-gencode", target, str(source_folder() / SOURCES[0]), "-o", str(output)]


@functools.cache
def nvcc_version(nvcc: str) -> str:
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"V(\d+(?:\.\d+)*)", said)
    return found[1] if found else "unknown"


def library_path(arch: str, version: str) -> Path:
    """Where the library that this version of nvcc makes from these sources for this architecture is kept."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for name in SOURCES:
        digest.update((source_folder() / name).read_bytes())
    cache = os.environ.get("MR1FAST_CACHE") or Path.home() / ".cache" / "mr1fast"
    name = f"grpo_cuda_{platform.machine()}_sm_{arch}_nvcc_{version}_{digest.hexdigest()[:16]}.so"
    return Path(cache) / name


def build(device: int, arch: str) -> Path:
    """The library, compiled and checked on that device if it is not there yet. Raises CannotBuild."""
    if not (source_folder() / SOURCES[0]).is_file():
        raise CannotBuild(
            f"the CUDA sources are not part of this installation ({source_folder()} lacks them); install mr1fast again"
        )
    nvcc = find_nvcc()
    path = library_path(arch, nvcc_version(nvcc) if nvcc else "*")
    if nvcc is None:  # where a library was built before, nvcc may be gone by now
        if built := sorted(path.parent.glob(path.name)):
            return built[-1]
        raise CannotBuild("nvcc was not found (CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda); install the CUDA toolkit")
    if path.is_file():
        return path
    import fcntl  # Windows has none, but does not get this far

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the processes of a distributed run all come here at once
        if not path.is_file():
            _compile_and_check(nvcc, device, arch, path)
    return path


def _compile_and_check(nvcc: str, device: int, arch: str, path: Path) -> None:
    print(f"mr1fast: compiling the CUDA kernels for sm_{arch}, once ({path})", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        fresh = Path(folder) / path.name
        done = subprocess.run(compile_command(nvcc, arch, fresh), capture_output=True, text=True)
        if done.returncode != 0:
            raise CannotBuild(f"{nvcc} failed:\n{done.stderr.strip()[-2000:]}")
        _check(fresh, device)
        os.replace(fresh, path)


def _check(library: Path, device: int) -> None:
    home = Path(str(sys.modules["mr1fast"].__file__)).parents[1]  # the checkout, or site-packages
    packages = os.pathsep.join(filter(None, [str(home), os.environ.get("PYTHONPATH")]))
    try:
        checked = subprocess.run(
            [sys.executable, "-m", "mr1fast.kernels.cuda_check", str(library), str(device)],
            capture_output=True,
            text=True,
            timeout=CHECK_SECONDS,
            env={**os.environ, "PYTHONPATH": packages},
        )
    except subprocess.TimeoutExpired:
        raise CannotBuild(f"the kernels did not finish on device {device} within {CHECK_SECONDS} s") from None
    said = checked.stderr.strip()
    if checked.returncode == NOT_CHECKED:
        reason = said.splitlines()[-1] if said else "no reason given"
        print(
            f"mr1fast: the CUDA kernels are used unchecked, because device {device} took no second process ({reason}); "
            "python -m mr1fast.kernels.cuda_check checks them when it is free",
            file=sys.stderr,
            flush=True,
        )
    elif checked.returncode != 0:
        raise CannotBuild(f"the kernels failed their check on device {device}:\n{said[-2000:]}")
