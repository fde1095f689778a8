"""What a step spends its time on."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


class Phases:
    """The phases of a step and the seconds of each.

    rollout (for supervised fine-tuning prompts), rewards, reference, policy (the loss and its gradient), optimizer.
    on_begin: is told the name of each phase that begins.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.on_begin: Callable[[str], None] = lambda phase: None
        self.times: dict[str, float] = {}
        self._phase, self._begun = "", 0.0

    def begin(self, phase: str) -> None:
        """The phase before ends here, on a GPU as soon as it has done what it was given."""
        now = self._end()
        self._phase, self._begun = phase, now
        self.on_begin(phase)

    def metrics(self) -> dict[str, float]:
        """The step ends here: step_time, and step_time/<phase> of each of its phases, in seconds."""
        self._end()
        times, self.times, self._phase = self.times, {}, ""
        return {"step_time": sum(times.values())} | {f"step_time/{phase}": spent for phase, spent in times.items()}

    def _end(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self._phase:
            self.times[self._phase] = self.times.get(self._phase, 0.0) + now - self._begun
        return now
