"""`mr1fast env`: what a bug report should say about the machine. Works whatever is missing or broken there."""

from __future__ import annotations

import os
import platform
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

import mr1fast
from mr1fast.options.program import Parser, exit_code, prog

PACKAGES = (
    *("torch", "triton", "numpy", "transformers", "tokenizers", "accelerate", "datasets", "torchvision", "flash-attn"),
    *("peft", "trl", "liger-kernel", "verl", "math-verify", "pebble", "pillow", "matplotlib"),
    *("tensorboard", "wandb", "trackio"),
)
# The prefixes of the environment variables that are shown.
SETTINGS = ("MR1FAST_", "TRITON_", "CUDA_", "NVIDIA_", "PYTORCH_", "TORCH_", "OMP_")


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def processor() -> str:
    """The processor as the system names it."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return name


def system() -> Iterator[tuple[str, str]]:
    """The interpreter, the machine, and the environment variables that change what runs."""
    yield "mr1fast", f"{mr1fast.__version__}, {Path(mr1fast.__file__).parent}"
    yield "python", f"{platform.python_version()}, {sys.executable}"
    yield "system", platform.platform()
    yield "processor", f"{processor()}, {os.cpu_count()} cores"
    settings = {name: value for name, value in os.environ.items() if name.startswith(SETTINGS)}
    yield "environment", " ".join(f"{name}={value}" for name, value in sorted(settings.items())) or "nothing set"


def packages() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        yield package, version(package)


def devices() -> Iterator[tuple[str, str]]:
    """What torch sees of this machine."""
    import torch

    from mr1fast.kernels.cuda_build import find_nvcc

    yield "threads", str(torch.get_num_threads())
    yield "built for", f"CUDA {torch.version.cuda}" if torch.version.cuda else f"no CUDA ({torch.__version__})"
    yield "nvcc", find_nvcc() or "not found"
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        capability = f"compute capability {gpu.major}.{gpu.minor}"
        yield f"cuda:{index}", f"{gpu.name}, {capability}, {gpu.total_memory / 2**30:.0f} GiB"


def backends(device: str) -> Iterator[tuple[str, str]]:
    """Whether each backend runs on that device, in the order in which backend="auto" tries them."""
    import torch

    from mr1fast.kernels import dispatch

    logits = torch.zeros(1, 1, 8, device=device)
    for backend in dispatch.BACKENDS:
        runs, reason = "runs", backend.why_not(logits)
        if backend.name == "cpp" and reason is None:
            try:
                runs += f", with {torch.ops.mr1fast_native.instruction_set()}"
            except ValueError as error:  # MR1FAST_CPU names what this processor lacks
                reason = str(error)
        yield backend.name, runs if reason is None else f"does not run: {reason}"
    yield "torch", "runs"
    yield "auto", f"takes {dispatch.resolve('auto', logits)}"


def report() -> Iterator[str]:
    """The lines that are printed."""
    yield from _aligned(system())
    yield "\npackages"
    yield from _aligned(packages())
    try:
        import torch

        yield "\ntorch"
        yield from _aligned(devices())
        yield "\nbackends on cpu"
        yield from _aligned(backends("cpu"))
        if torch.cuda.is_available():
            yield "\nbackends on cuda"
            yield from _aligned(backends("cuda"))
        else:
            yield "\nbackends on cuda: there is no CUDA device that this torch can use"
    except Exception as error:  # what is broken here is what the report is for
        yield f"\nthis report ends early: {type(error).__name__}: {error}"


def _aligned(rows: Iterator[tuple[str, str]]) -> Iterator[str]:
    return (f"{name:14}{value}" for name, value in rows)


def run(arguments: Sequence[str] | None) -> None:
    """Raises UserError."""
    parser = Parser(
        prog=prog("env"),
        description="Print versions and devices, and for each backend whether it runs here or why it does not. "
        "Please include this output when you report a problem.",
        allow_abbrev=False,
    )
    parser.parse(arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reason for a missing backend is a warning, too
        for line in report():
            print(line, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    return exit_code(run, arguments)


if __name__ == "__main__":
    sys.exit(main())
