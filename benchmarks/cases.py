"""What a benchmark is, and the list of all of them. To add some, write `scenes()` in a module and name it in GROUPS.

A scene is one set of inputs; its cases are different ways to do the same work on them. Cases of one scene are measured
in turn (see timing.py), so that their ratios hold even where the machine is busy.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

GROUPS = {
    "loss": ("benchmarks.cases_loss", "the loss head from logits, on the CPU"),
    "linear": ("benchmarks.cases_linear", "the loss from hidden states and the lm_head's weight"),
    "packed": ("benchmarks.cases_packed", "what padding costs: completions of unequal length, packed and padded"),
    "update": ("benchmarks.cases_update", "an update of the trainer on the CPU: its memory, with logits and without"),
    "passes": ("benchmarks.cases_passes", "the policy's forward and backward: packed, plain and padded"),
    "step": ("benchmarks.cases_step", "a whole step beside TRL's: sampling, reference, policy, optimizer"),
    "scale": ("benchmarks.cases_scale", "a whole step on the CPU, alone and divided between two processes"),
    "gpu": ("benchmarks.cases_gpu", "the loss head from logits, on a CUDA device: Qwen2-VL's, in bfloat16"),
    "shapes": ("benchmarks.cases_gpu", "the same in float32 and with other vocabularies"),
}


class Call(NamedTuple):
    """What is timed, what restores its inputs before each time (not timed), and a remark on how the time was spent.

    whole: Python and the device's work belong together, and are timed once as they are, on a GPU too.
    """

    run: Callable[[], object]
    reset: Callable[[], object] = lambda: None
    remark: Callable[[], str] = lambda: ""
    whole: bool = False


@dataclass(frozen=True)
class Case:
    """One way to do a scene's work.

    prepare: from the scene's inputs, the call to time.
    work: what must be done at least, in `unit`s times 1e9 (bytes that must move, or floating-point operations).
    limit: name of the scene's case that shows how fast this work can be done on this machine.
    against: name of the case whose time this one's is divided by in the column `ratio`.
    fresh_pages: also measure with memory that the system hands out anew at every call (CPU; see timing.py).
    late: compiles or tunes for long; on a GPU it waits until the scene's other cases have been measured.
    """

    name: str
    prepare: Callable[[Any], Call]
    work: float
    unit: str = "GB/s"
    limit: str | None = None
    against: str | None = None
    fresh_pages: bool = False
    late: bool = False


@dataclass(frozen=True)
class Scene:
    """Inputs and the cases on them. why_not: a sentence if it cannot be measured here, which is then reported."""

    group: str
    shape: str  # as printed, "512 x 151936"
    dtype: str
    inputs: Callable[[], Any]
    cases: tuple[Case, ...]
    device: str = "cpu"
    why_not: Callable[[], str | None] = lambda: None

    @property
    def title(self) -> str:
        return f"{self.group}, {self.shape}, {self.dtype}"


def load(group: str, quick: bool) -> list[Scene]:
    """The scenes of a group; `quick` asks for small ones, which show that everything runs."""
    return [scene for scene in importlib.import_module(GROUPS[group][0]).scenes(quick) if scene.group == group]


def device_for(quick: bool) -> str:
    """Where the cases for a GPU run: quick ones without one on the CPU, to see that their calls are right."""
    return "cpu" if quick and not torch.cuda.is_available() else "cuda"


def without_gpu(device: str) -> str | None:
    """Why a scene on this device cannot be measured here, if it cannot."""
    return "there is no CUDA device" if device == "cuda" and not torch.cuda.is_available() else None


def matching(scenes: list[Scene], pattern: str, alone: bool = False) -> list[tuple[Scene, tuple[Case, ...]]]:
    """The scenes with the cases whose "group, shape, dtype, name" contains every word of the pattern.

    The cases that others refer to (`limit`, `against`) and memcpy stay where any other case of their scene does, unless
    those are to be `alone`.
    """
    selected = []
    for scene in scenes:
        words = pattern.lower().split()
        wanted = [case for case in scene.cases if all(word in f"{scene.title}, {case.name}".lower() for word in words)]
        needed = {case.name for case in wanted}
        if not alone:
            needed |= {name for case in wanted for name in (case.limit, case.against, "memcpy") if name}
        if wanted:
            selected.append((scene, tuple(case for case in scene.cases if case.name in needed)))
    return selected
