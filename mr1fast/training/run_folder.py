"""Where a run keeps its files.

    runs/2026-01-31-12-00-00/
        config.json            the options, as `--config` reads them
        metrics.jsonl          one line per step and task; step 0 is before training
        result.json            accuracies before and after
        curves.png, samples.png
        tensorboard/vc/
        vc/checkpoint-000050/  model, processor, trainer_state.pt
        vc/model/              the trained model
        vc/skipped/            samples of steps with NaN or inf

Imports no torch, so that a folder that does not do is reported at once.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from mr1fast import __version__
from mr1fast.errors import UserError
from mr1fast.options.config import TrainConfig, flag
from mr1fast.options.parse import Request

RUNS = Path("runs")


class ResumeError(UserError):
    """A run that is finished, or that does not go on like this: the usual advice to resume it does not follow."""


class RunFolder:
    """The paths of a run, and its result.json."""

    def __init__(self, path: Path):
        self.path = path
        self.config_file = path / "config.json"
        self.metrics_file = path / "metrics.jsonl"
        self.result_file = path / "result.json"
        self.curves, self.samples = path / "curves.png", path / "samples.png"

    def task(self, name: str) -> Path:
        return self.path / name

    def model(self, name: str) -> Path:
        return self.task(name) / "model"

    def tensorboard(self, name: str) -> Path:
        return self.path / "tensorboard" / name

    def read_result(self) -> dict[str, Any]:
        return json.loads(self.result_file.read_text(encoding="utf-8")) if self.result_file.exists() else {}

    def write_result(self, result: dict[str, Any]) -> None:
        write_json(self.result_file, result)


@dataclass(frozen=True)
class OpenRun:
    folder: RunFolder
    config: TrainConfig
    checkpoint: Path | None  # the one to go on from, where the user named it; else the newest of each task

    def names_checkpoint_of(self, task: str) -> bool:
        return self.checkpoint is not None and self.checkpoint.parent.name == task


def open_run(request: Request) -> OpenRun:
    """A new folder for a new run, or the folder and options of the one to resume. Raises UserError."""
    if request.resume is None:
        if request.config.data is not None and not Path(request.config.data).exists():
            raise UserError(f"--data {request.config.data} does not exist")
        return OpenRun(
            RunFolder(
                new_folder(
                    request.config.output_dir,
                    default=RUNS / time.strftime("%Y-%m-%d-%H-%M-%S"),
                    advice=", or go on with --resume",
                )
            ),
            request.config,
            None,
        )
    folder, checkpoint = _find_run(request.resume, request.config.output_dir)
    try:
        config = TrainConfig(**json.loads(folder.config_file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise UserError(f"{folder.config_file} is not the configuration of a run; nothing to resume") from None
    for name, value in request.given.items():
        if name != "output_dir" and value != getattr(config, name):
            own = "the default" if getattr(config, name) is None else getattr(config, name)
            raise UserError(
                f"--resume goes on with the run's own options: {flag(name)} was {own} there, and is {value} here"
                + (_how_to_train_longer(folder) if name == "max_steps" else "")
            )
    return OpenRun(folder, config, checkpoint)


def _how_to_train_longer(folder: RunFolder) -> str:
    models = sorted(folder.path.glob("*/model"))
    return f"; to train longer, start a new run from --model {models[0]}" if models else ""


def new_folder(output_dir: str | None, *, default: Path, advice: str = "") -> Path:
    """`output_dir`, which must be new or empty, or an unused folder like `default`; made. Raises UserError."""
    path = Path(output_dir) if output_dir is not None else default
    try:
        if output_dir is None:
            path = _unused(path)
        path.mkdir(parents=True, exist_ok=True)
        if any(path.iterdir()):
            raise UserError(f"output folder {path} is not empty; choose another one{advice}")
        probe = path / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"output folder {path} cannot be written: {error.strerror}") from None
    return path


def _unused(path: Path) -> Path:
    """`path`, or with a number after it if another run began in the same second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in range(1, 1000):
        candidate = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            candidate.mkdir()
            return candidate
        except FileExistsError:
            continue
    raise UserError(f"output folder {path} and its 998 successors exist already")


def checkpoints(task_folder: Path) -> list[Path]:
    """The whole checkpoints of a task, oldest first."""
    return sorted(task_folder.glob("checkpoint-*"))


def step_of(path: Path) -> int:
    """Of checkpoint-000050, and of step-000050.json."""
    return int(path.stem.rpartition("-")[2])


def _find_run(resume: str, output_dir: str | None) -> tuple[RunFolder, Path | None]:
    """The run that DIR is, or is a checkpoint of; without DIR the one with the newest checkpoint."""
    if resume:
        path = Path(resume)
        if not path.is_dir():
            raise UserError(f"--resume {resume}: there is no such folder")
        if path.name.startswith("checkpoint-"):
            return RunFolder(path.parent.parent), path
        if not (path / "config.json").is_file():  # a run that was stopped early may have no checkpoint yet
            raise UserError(f"nothing to resume: {resume} is neither a run nor a checkpoint of one")
        return RunFolder(path), None
    root = RUNS if output_dir is None else Path(output_dir)
    newest = max(
        (checkpoint for pattern in ("*/checkpoint-*", "*/*/checkpoint-*") for checkpoint in root.glob(pattern)),
        key=lambda checkpoint: checkpoint.stat().st_mtime_ns,
        default=None,
    )
    if newest is None:
        raise UserError(f"nothing to resume: there is no checkpoint under {root}")
    return RunFolder(newest.parent.parent), None


def versions() -> dict[str, str]:
    """What computed the figures of result.json and evaluation.json."""
    packages = {name: metadata.version(name) for name in ("torch", "transformers")}
    return {"mr1fast": __version__, **packages, "python": platform.python_version()}


def write_text(path: Path, text: str) -> None:
    """Replace a file as a whole, so that a reader (or a full disk) never meets half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_config(folder: RunFolder, config: TrainConfig) -> None:
    write_json(folder.config_file, dataclasses.asdict(config))
