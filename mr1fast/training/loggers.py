"""Where a run's figures are shown, beside metrics.jsonl: TensorBoard, Weights & Biases, Trackio (--report-to).

A logger that fails, because there is no network, no login or no space, is left out from then on, which is said once.
Imports no torch, so that a package that is missing is reported at once.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from mr1fast.errors import UserError
from mr1fast.training.run_folder import RunFolder

if TYPE_CHECKING:
    from mr1fast.training.scoring import Scored

MAX_SIDE = 512  # pixels; larger images are scaled down
PROJECT = "mr1fast"


class Logger(Protocol):
    """Shows the run of one task."""

    def log(self, step: int, metrics: dict[str, float], completions: Sequence[Scored]) -> None:
        """Metrics after `step` steps, under TRL's names, and completions of that step to show, if there are any."""

    def close(self) -> None: ...


def check_installed(names: Sequence[str]) -> None:
    """Raises UserError for a logger whose package is not installed."""
    for name in names:
        try:
            found = hasattr(import_module(name), "init" if name in TRACKERS else "__version__")
            reason = "is not installed"  # also where there only is a folder of that name, such as wandb makes
        except Exception as error:
            found, reason = False, "is not installed" if isinstance(error, ModuleNotFoundError) else f"fails: {error}"
        if not found:
            advice = f"run '{sys.executable} -m pip install {name}', or leave {name} out of --report-to"
            raise UserError(f"--report-to {name}: the package {name} {reason}; {advice}")


def open_loggers(
    names: Sequence[str], run: RunFolder, task: str, *, first_step: int, config: dict[str, Any]
) -> list[Logger]:
    """Loggers of the run of one task. What they have from `first_step` on comes again; config: options by name."""
    return [Guarded(name, partial(_open, name, run, task, first_step, config)) for name in names]


def _open(name: str, run: RunFolder, task: str, first_step: int, config: dict[str, Any]) -> Logger:
    if name in TRACKERS:
        return Tracker(name, run, task, config)
    return TensorBoard(run, task, first_step)


class Guarded:
    """A logger that may fail without harm to the run."""

    def __init__(self, name: str, make: Callable[[], Logger]):
        self.name = name
        self.logger: Logger | None = None
        self._try(lambda: setattr(self, "logger", make()))

    def log(self, step: int, metrics: dict[str, float], completions: Sequence[Scored]) -> None:
        if (logger := self.logger) is not None:
            self._try(lambda: logger.log(step, metrics, completions))

    def close(self) -> None:
        if (logger := self.logger) is not None:
            self._try(logger.close)

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            from tqdm import tqdm

            self.logger = None
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            tqdm.write(f"warning: {self.name} failed, and the run goes on without it: {reason}", file=sys.stderr)


def _leave_to_the_next_call(before: Callable[[Any], Any], args: threading.ExceptHookArgs) -> None:
    """No traceback of TensorBoard's own thread: the run's next call raises the same error, which `Guarded` reports.

    before: the hook that was there, which other threads keep.
    """
    if not type(args.thread).__module__.startswith("tensorboard."):
        before(args)


class TensorBoard:
    def __init__(self, run: RunFolder, task: str, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        threading.excepthook = partial(_leave_to_the_next_call, threading.excepthook)
        self.writer = SummaryWriter(str(run.tensorboard(task)), purge_step=first_step)

    def log(self, step: int, metrics: dict[str, float], completions: Sequence[Scored]) -> None:
        import numpy as np

        from mr1fast.data.images import side_by_side

        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        prompts: dict[int, list[Scored]] = {}
        for one in completions:
            prompts.setdefault(id(one.example), []).append(one)
        for number, group in enumerate(prompts.values(), start=1):
            self.writer.add_text(f"completions/{number}", _markdown(group), step)
            if (image := side_by_side(group[0].example.images, MAX_SIDE)) is not None:
                self.writer.add_image(f"completions/{number}", np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


def _markdown(group: Sequence[Scored]) -> str:
    """The completions of one prompt, each as a block of code, so that nothing in them means anything."""
    example = group[0].example
    blocks = [_code(f"{example.problem}\ntrue answer: {example.solution}")]
    for one in group:
        rewards = ", ".join(f"{name} {value:.3g}" for name, value in one.rewards.items())
        blocks += [f"{rewards}, advantage {one.advantage:.3g}", _code(one.completion or "(nothing)")]
    return "\n\n".join(blocks)


def _code(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


# Trackio has the functions of wandb. A run stands in a project of this name; both have a variable for another one.
TRACKERS = {"wandb": "WANDB_PROJECT", "trackio": "TRACKIO_PROJECT"}


class Tracker:
    """A run of wandb or Trackio, with the names that transformers and TRL give to metrics and tables."""

    def __init__(self, name: str, run: RunFolder, task: str, config: dict[str, Any]):
        self.module: Any = import_module(name)
        group, identity = run.path.resolve().name, _identity(run, task)
        settings: dict[str, Any] = {"project": os.environ.get(TRACKERS[name], PROJECT), "group": group}
        if name == "wandb":
            settings |= {"name": f"{group}-{task}", "id": identity, "dir": str(run.path)}
            settings |= {"resume": "allow"} if (run.path / "wandb").exists() else {}  # offline it warns of that
        else:  # Trackio tells runs apart by their names
            settings |= {"name": f"{group}-{task}-{identity}", "resume": "allow"}
        self.run = self.module.init(**settings, config=config)
        if name == "wandb":
            self.run.define_metric("train/global_step")
            self.run.define_metric("*", step_metric="train/global_step", step_sync=True)

    def log(self, step: int, metrics: dict[str, float], completions: Sequence[Scored]) -> None:
        row: dict[str, Any] = {
            name if name.startswith("eval/") else f"train/{name}": value for name, value in metrics.items()
        }
        if completions:
            row["completions"] = self._table(step, completions)
        # A resumed run may log a step again, which Trackio takes, but not wandb's own count of steps.
        own_step = {} if self.module.__name__ == "wandb" else {"step": step}
        self.run.log({**row, "train/global_step": step}, **own_step)

    def _table(self, step: int, completions: Sequence[Scored]) -> Any:
        from mr1fast.data.images import side_by_side

        rewards = list(completions[0].rewards)
        columns = ["step", "image", "prompt", "solution", "completion", *rewards, "advantage"]
        rows = []
        for one in completions:
            example, image = one.example, side_by_side(one.example.images, MAX_SIDE)
            shown = None if image is None else self.module.Image(image)
            values = [None if math.isnan(value) else value for value in one.rewards.values()]
            rows.append([step, shown, example.problem, example.solution, one.completion, *values, one.advantage])
        return self.module.Table(columns=columns, data=rows)

    def close(self) -> None:
        self.run.finish()


def _identity(run: RunFolder, task: str) -> str:
    """By what a tracker knows the run of a task, also when it is resumed, and whatever its folder is called."""
    file = run.task(task) / "run_id"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
    return file.read_text(encoding="utf-8")
