"""Measuring the cases of a scene in turn.

Each round calls every case once, so that a slow stretch of the machine falls on all of them; a case's time is the
median over rounds. On the CPU two modes differ in where large buffers come from:

- warm: freed memory stays with the process, and a new buffer is one that was used before (a training loop under an
  allocator that keeps memory, such as jemalloc);
- fresh: glibc's default, where every large buffer is new memory that the system maps and clears page by page. It often
  costs more than the work itself.

On a GPU the second-level cache is flushed before each call, and a call is timed in two ways: by the device's own clock,
behind a delay that lets Python get ahead of the device, so that only the device's work counts; and from the call to the
end of its work on an idle device, Python included.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.cases import Call, Case, Scene

# The CPU's clock; --processor-time sets time.process_time, which stands still while others have the machine.
now: Callable[[], float] = time.perf_counter
SLOW = 10.0  # seconds; a case that takes longer is called no more often than it must be
LONGEST_DELAY = 0.2  # seconds before a call on a GPU; the first call, which may compile, would ask for far more


class Times(NamedTuple):
    """Of one call, in seconds. work: on a GPU, the device's alone. call: on a GPU, with Python; None on the CPU."""

    work: float
    call: float | None = None


@dataclass
class Measurement:
    """pages: "warm", "fresh" or "" (nothing measured). times: one per round. peak_extra: bytes, or None."""

    case: Case
    pages: str
    times: list[Times] = field(default_factory=list)
    peak_extra: float | None = None
    note: str = ""
    remark: Callable[[], str] = lambda: ""

    @property
    def seconds(self) -> list[float]:
        return [times.work for times in self.times]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def median_call(self) -> float | None:
        """None on the CPU, where a call is its work."""
        calls = [times.call for times in self.times if times.call is not None]
        return statistics.median(calls) if calls else None

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


class _Turn(NamedTuple):
    """A case in one of its modes, warmed up, and the rounds it takes part in."""

    measurement: Measurement
    call: Call
    rounds: int


def measure(
    scene: Scene, cases: tuple[Case, ...], budget: float, on_call: Callable[[str], object]
) -> Iterator[list[Measurement]]:
    """Measures all cases; yields everything so far whenever there is something new, for whoever may be cut off.

    About `budget` seconds of timed calls for each case and mode, and at most 25 calls. on_call is told the name of the
    case before each call. A case that raises is reported in its note, with the times that it had until then.
    """
    if reason := scene.why_not():
        yield [Measurement(case, "", note=f"not measured: {reason}") for case in cases]
        return
    torch.compiler.reset()  # what an earlier scene compiled would be compiled again for any shape, which is slower
    try:
        inputs = scene.inputs()
    except Exception as error:
        yield [Measurement(case, "", note=f"not measured, no inputs: {_said(error)}") for case in cases]
        return
    earlier: list[Measurement] = []
    for late in (False, True):
        turns: list[_Turn] = []
        for case in cases:
            if (case.late and scene.device == "cuda") is late:
                on_call(case.name)
                turns += _first_turns(case, inputs, scene.device, budget)
                yield earlier + [turn.measurement for turn in turns]
        earlier += [turn.measurement for turn in turns]
        for _ in _rounds(turns, CLOCKS[scene.device], on_call):
            yield earlier


def _first_turns(case: Case, inputs: object, device: str, budget: float) -> list[_Turn]:
    """The case in each of its modes. On a GPU the call that warms it up counts: there may be no time for another."""
    gc.collect(1)  # what the case before left behind; a whole collection would take a fifth of a second
    try:
        call = case.prepare(inputs)
        with memory_pages("fresh"):
            first, peak = _warm_up(call, device)
    except Exception as error:
        return [_Turn(Measurement(case, "", note=f"not measured: {_said(error)}"), Call(lambda: None), 0)]
    seconds = first.work + (first.call or 0)
    rounds = 1 if seconds > SLOW else max(3, min(25, int(budget / seconds)))
    warm = Measurement(case, "warm", [first] if device == "cuda" else [], peak, remark=call.remark)
    turns = [_Turn(warm, call, rounds)]
    if case.fresh_pages and device == "cpu":
        turns.append(_Turn(Measurement(case, "fresh", peak_extra=peak), call, rounds))
    return turns


def _rounds(turns: list[_Turn], clock: Callable[[Call], Times], on_call: Callable[[str], object]) -> Iterator[None]:
    """Yields after every round.

    One mode after the other: a round of fresh pages gives memory back, and the next warm one would map it again.
    """
    for pages in ("warm", "fresh"):
        chosen = [turn for turn in turns if turn.measurement.pages == pages]
        with memory_pages(pages):
            for number in range(max((turn.rounds for turn in chosen), default=0)):
                for measurement, call, rounds in chosen:
                    if number < rounds and not measurement.note:
                        on_call(measurement.case.name)
                        try:
                            measurement.times.append(clock(call))
                        except Exception as error:
                            measurement.note = f"broke off in round {number + 1}: {_said(error)}"
                yield


def _said(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    return f"{type(error).__name__}: {error}"


def _warm_up(call: Call, device: str) -> tuple[Times, float | None]:
    """(times, peak extra bytes) of a call; the first, which may compile, counts only if it is very slow."""
    first, peak = _with_peak(call, device)
    return (first, peak) if first.work > 2 * SLOW else _with_peak(call, device)


# ---- clocks ---------------------------------------------------------------------------------------------------------


def _cpu_clock(call: Call) -> Times:
    call.reset()
    start = now()
    call.run()
    return Times(now() - start)


def _gpu_clock(call: Call) -> Times:
    """Two calls: on an idle device; then behind a delay of one and a half times as long, for Python to get ahead.

    Where a call waits for the device halfway, what the device then waits for Python counts as its work. Of a whole one
    only the first.
    """
    _start_cold(call)
    torch.cuda.synchronize()
    began = time.perf_counter()
    call.run()
    torch.cuda.synchronize()
    whole = time.perf_counter() - began
    if call.whole:
        return Times(whole)
    _start_cold(call)
    delay = min(1.5 * whole, LONGEST_DELAY)
    return Times(_device_seconds(lambda: torch.cuda._sleep(int(delay * _cycles_per_second())), call.run), whole)


def _start_cold(call: Call) -> None:
    call.reset()
    _cache_flush().zero_()


def _device_seconds(before: Callable[[], object], work: Callable[[], object]) -> float:
    """Of `work` on the device, which begins with `before`."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before()
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@functools.cache
def _cycles_per_second() -> float:
    """Of torch.cuda._sleep, at the highest clock seen: at a lower one a delay is longer, which does no harm."""
    cycles = 50_000_000
    return cycles / min(_device_seconds(lambda: None, lambda: torch.cuda._sleep(cycles)) for _ in range(3))


CLOCKS: dict[str, Callable[[Call], Times]] = {"cpu": _cpu_clock, "cuda": _gpu_clock}

_flush: torch.Tensor | None = None


def _cache_flush() -> torch.Tensor:
    global _flush
    if _flush is None:
        _flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")  # larger than any second-level cache
    return _flush


# ---- memory ---------------------------------------------------------------------------------------------------------


def _with_peak(call: Call, device: str) -> tuple[Times, float | None]:
    """(times, bytes by which memory grew at most) of one call."""
    if device == "cuda":
        call.reset()
        _cache_flush()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        times = _gpu_clock(call)
        return times, torch.cuda.max_memory_allocated() - before
    call.reset()
    libc_call("malloc_trim", 0)
    before_call, reset = process_status("VmRSS"), reset_high_water()
    start = now()
    call.run()
    times = Times(now() - start)
    peak = process_status("VmHWM")
    return times, peak - before_call if reset and peak is not None and before_call is not None else None


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
