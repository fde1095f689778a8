"""What counts as the device's time and what as the call's, on a device that is made up.

It does one thing after the other, and Python hands it work without waiting.
"""

import pytest
import torch

from benchmarks import timing
from benchmarks.cases import Call, Case, Scene

HERTZ = 1.5e9
PYTHON, KERNEL = 5e-4, 1e-4  # seconds before a launch, and of it


class Device:
    def __init__(self):
        self.host = 0.0  # what the clock on Python's side shows
        self.idle_from = 0.0  # when the device has done all it was given

    def launch(self, seconds):
        self.idle_from = max(self.idle_from, self.host) + seconds

    def synchronize(self):
        self.host = max(self.host, self.idle_from)

    def event(self, enable_timing):
        return Event(self)

    def zero_(self):
        self.launch(1e-4)

    def call(self):
        self.host += PYTHON
        self.launch(KERNEL)
        self.host += PYTHON / 2

    def call_that_waits(self):
        self.call()
        self.synchronize()
        self.call()


class Event:
    def __init__(self, device):
        self.device = device

    def record(self):
        self.at = max(self.device.host, self.device.idle_from)

    def synchronize(self):
        self.device.synchronize()

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


@pytest.fixture
def device(monkeypatch):
    device = Device()
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr(torch.cuda, "synchronize", device.synchronize)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: device.launch(cycles / HERTZ))
    monkeypatch.setattr(timing, "_cache_flush", lambda: device)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: device.host)
    timing._cycles_per_second.cache_clear()
    yield device
    timing._cycles_per_second.cache_clear()


def test_python_is_no_time_of_the_device(device):
    times = timing._gpu_clock(Call(device.call))
    assert times.work == pytest.approx(KERNEL)
    assert times.call == pytest.approx(1.5 * PYTHON)


def test_without_the_delay_it_would_be(device, monkeypatch):
    monkeypatch.setattr(timing, "LONGEST_DELAY", 0.0)
    device.host = 1.0  # the flush is over before Python gets there
    assert timing._gpu_clock(Call(device.call, device.synchronize)).work > KERNEL + PYTHON / 2


def test_a_call_that_waits_for_the_device_shows_it(device):
    times = timing._gpu_clock(Call(device.call_that_waits))
    assert times.work == pytest.approx(KERNEL + 1.5 * PYTHON), "all that comes after it waited"
    assert times.call == pytest.approx(3 * PYTHON)


def test_the_cycles_of_a_second_are_measured(device):
    assert timing._cycles_per_second() == pytest.approx(HERTZ)


def test_late_cases_wait_for_the_others_and_the_first_call_counts(device, monkeypatch):
    monkeypatch.setattr(timing, "_with_peak", lambda call, kind: (timing._gpu_clock(call), 0))
    names = []
    cases = tuple(Case(name, lambda inputs: Call(device.call), 1, late=name == "late") for name in ("late", "soon"))
    scene = Scene("gpu", "1 x 1", "float32", lambda: None, cases, "cuda")
    results = timing.measure(scene, cases, 1e-2, names.append)
    (first,) = next(results)
    assert first.case.name == "soon"
    assert len(first.times) == 1, "there is a time as soon as it has warmed up"
    *_, last = results
    assert [measurement.case.name for measurement in last] == ["soon", "late"]
    assert names == ["soon"] * names.index("late") + ["late"] * names.count("late")
    assert last[0].median == pytest.approx(KERNEL)
    assert last[0].median_call == pytest.approx(1.5 * PYTHON)
