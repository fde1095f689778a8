"""Measuring the cases of a scene in turn.

Each round calls every case once, so that a slow stretch of the machine falls on all of them; a case's time is the
median over rounds. On the CPU two modes differ in where large buffers come from:

- warm: freed memory stays with the process, and a new buffer is one that was used before (a training loop under an
  allocator that keeps memory, such as jemalloc);
- fresh: glibc's default, where every large buffer is new memory that the system maps and clears page by page. It often
  costs more than the work itself.

On a GPU the second-level cache is flushed before each call, and the device's own clock is read.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.cases import Call, Case, Scene

# The CPU's clock; --processor-time sets time.process_time, which stands still while others have the machine.
now: Callable[[], float] = time.perf_counter
SLOW = 5.0  # seconds; a case that takes longer is called no more often than it must be


@dataclass
class Measurement:
    """pages: "warm", "fresh" or "" (GPU, or no difference). seconds: one per round. peak_extra: bytes, or None."""

    case: Case
    pages: str
    seconds: list[float] = field(default_factory=list)
    peak_extra: float | None = None
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        return min(self.seconds)

    @property
    def rate(self) -> float:
        """In the case's unit, at the median."""
        return self.case.work / self.median / 1e9

    @property
    def best_rate(self) -> float:
        return self.case.work / self.best / 1e9


def measure(
    scene: Scene, cases: tuple[Case, ...], budget: float, on_call: Callable[[str], object]
) -> list[Measurement]:
    """All cases in both modes; about `budget` seconds of timed calls for each case and mode, and at most 25 calls.

    on_call is told the name of the case before each call. A case that raises is reported in its note, with the times
    that it had until then.
    """
    if reason := scene.why_not():
        return [Measurement(case, "", note=f"not measured: {reason}") for case in cases]
    clock = _gpu_clock if scene.device == "cuda" else _cpu_clock
    torch.compiler.reset()  # what an earlier scene compiled would be compiled again for any shape, which is slower
    try:
        inputs = scene.inputs()
    except Exception as error:
        return [Measurement(case, "", note=f"not measured, no inputs: {_said(error)}") for case in cases]
    prepared: list[tuple[Measurement, Call, int]] = []
    failed = []
    for case in cases:
        on_call(case.name)
        try:
            call = case.prepare(inputs)
            with memory_pages("fresh"):
                first, peak = _warm_up(call, scene.device, clock)
        except Exception as error:
            failed.append(Measurement(case, "", note=f"not measured: {_said(error)}"))
            continue
        repeats = 1 if first > SLOW else max(3, min(25, int(budget / first)))
        prepared.append((Measurement(case, "warm", peak_extra=peak), call, repeats))
        if case.fresh_pages and scene.device == "cpu":
            prepared.append((Measurement(case, "fresh", peak_extra=peak), call, repeats))
    # One mode after the other: a round of fresh pages gives memory back, and the next warm one would map it again.
    for pages in ("warm", "fresh"):
        with memory_pages(pages):
            turns = [turn for turn in prepared if turn[0].pages == pages]
            for round_ in range(max((repeats for *_, repeats in turns), default=0)):
                for measurement, call, repeats in turns:
                    if round_ < repeats and not measurement.note:
                        on_call(measurement.case.name)
                        try:
                            measurement.seconds.append(clock(call))
                        except Exception as error:
                            measurement.note = f"broke off in round {round_ + 1}: {_said(error)}"
    return [measurement for measurement, *_ in prepared] + failed


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _warm_up(call: Call, device: str, clock: Callable[[Call], float]) -> tuple[float, float | None]:
    """(seconds, peak extra bytes) of a call; the first, which may compile, counts only if it is very slow."""
    first, peak = _with_peak(call, device, clock)
    return (first, peak) if first > 2 * SLOW else _with_peak(call, device, clock)


# ---- clocks ---------------------------------------------------------------------------------------------------------


def _cpu_clock(call: Call) -> float:
    call.reset()
    start = now()
    call.run()
    return now() - start


def _gpu_clock(call: Call) -> float:
    call.reset()
    _cache_flush().zero_()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call.run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


_flush: torch.Tensor | None = None


def _cache_flush() -> torch.Tensor:
    global _flush
    if _flush is None:
        _flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")  # larger than any second-level cache
    return _flush


# ---- memory ---------------------------------------------------------------------------------------------------------


def _with_peak(call: Call, device: str, clock: Callable[[Call], float]) -> tuple[float, float | None]:
    """(seconds, bytes by which memory grew at most) of one call."""
    gc.collect()
    if device == "cuda":
        call.reset()
        _cache_flush()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds = clock(call)
        return seconds, torch.cuda.max_memory_allocated() - before
    call.reset()
    libc_call("malloc_trim", 0)
    before_call, reset = process_status("VmRSS"), reset_high_water()
    start = now()
    call.run()
    seconds = now() - start
    peak = process_status("VmHWM")
    return seconds, peak - before_call if reset and peak is not None and before_call is not None else None


def process_status(name: str) -> int | None:
    """A line of /proc/self/status, in bytes; None where there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":")), None)


def reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # malloc.h


@contextmanager
def memory_pages(mode: str) -> Iterator[None]:
    """ "warm": malloc keeps what is freed. "fresh": every large buffer is mapped anew, as glibc does by default."""
    warm = mode == "warm"
    libc_call("mallopt", M_MMAP_MAX, 0 if warm else 65536)
    libc_call("mallopt", M_MMAP_THRESHOLD, 128 * 1024)  # setting it also stops glibc from adapting it
    libc_call("mallopt", M_TRIM_THRESHOLD, -1 if warm else 128 * 1024)
    yield
    libc_call("mallopt", M_MMAP_MAX, 65536)
    libc_call("mallopt", M_TRIM_THRESHOLD, 128 * 1024)


def libc_call(name: str, *args: int) -> None:
    """Calls glibc's `name`; other C libraries keep their own way with memory, and both modes are the same."""
    function = getattr(ctypes.CDLL(None), name, None)
    if function is not None:
        function(*args)
