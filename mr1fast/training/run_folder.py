"""Where a run keeps its files.

    runs/2026-01-31-12-00-00/
        config.json            the options with every default filled in, as `--config` reads them
        SHA256SUMS             of config.json and result.json
        metrics.jsonl          one line per step and task; step 0 is before training
        result.json            accuracies before and after
        run.html               the run as it goes, for a browser
        curves.png, samples.png
        answers/before-training/vc.jsonl
        answers/trained-on-vc/vc.jsonl
        tensorboard/vc/
        vc/checkpoint-000050/  model, processor, trainer_state.pt, metrics.jsonl, SHA256SUMS
        vc/model/              the trained model; with LoRA, its adapter; SHA256SUMS
        vc/adapter/            with LoRA and --merge, the adapter; vc/model is the whole model
        vc/skipped/            samples of steps with NaN or inf

Imports no torch, so that an unusable folder is reported at once.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from mr1fast import __version__
from mr1fast.errors import UserError
from mr1fast.options.config import TrainConfig
from mr1fast.options.config_file import SCHEMA_VERSION
from mr1fast.training.manifest import is_changed, replace_hashed, write_text

RUNS = Path("runs")
METRICS = "metrics.jsonl"  # of a run, and the rows of one task so far in each checkpoint
LEFT_AT_THE_START = (".probe.tmp", ".config.json.tmp")  # by a run that was killed before it had a config.json
STATE = "trainer_state.pt"  # of a checkpoint; training cannot be continued without it
# Options that a resumed run may be given anew; config.json then has the new values.
CHANGEABLE = ("data", "image_root", "allow_outside", "max_steps")


class ResumeError(UserError):
    """A run that is finished or cannot be resumed like this; the usual advice to resume does not follow the error."""


class RunFolder:
    """The paths of a run, its config.json and its result.json."""

    def __init__(self, path: Path):
        self.path = path
        self.identity: tuple[int, int] | None = None  # of the folder, once a run is open
        self.config_file = path / "config.json"
        self.metrics_file = path / METRICS
        self.result_file = path / "result.json"
        self.page = path / "run.html"
        self.curves, self.samples = path / "curves.png", path / "samples.png"

    def task(self, name: str) -> Path:
        return self.path / name

    def model(self, name: str) -> Path:
        return self.task(name) / "model"

    def adapter(self, name: str) -> Path:
        return self.task(name) / "adapter"

    def tensorboard(self, name: str) -> Path:
        return self.path / "tensorboard" / name

    def answers(self, when: str) -> Path:
        """The folder of the answers to test problems, `when` being "before training" or "trained on vc"."""
        return self.path / "answers" / when.replace(" ", "-")

    def read_result(self) -> dict[str, Any]:
        """The content of result.json, or {} if there is none yet. Raises ResumeError."""
        try:
            result = json.loads(self.result_file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError):
            result = None
        if not isinstance(result, dict):
            raise ResumeError(f"{self.result_file} is damaged; move it away, and --resume will evaluate again")
        return result

    def write_result(self, result: dict[str, Any]) -> None:
        self.check_there()
        replace_hashed(self.result_file, _as_json(result))

    def remember(self) -> None:
        """From now on this very folder has to be there."""
        self.identity = _identity(self.path)

    def check_there(self) -> None:
        """Raises UserError if the folder has been moved or removed, which would leave the run in two halves."""
        if self.identity is not None and _identity(self.path) != self.identity:
            where = "what it had written is where the folder is now, and --resume goes on there"
            raise UserError(f"{self.path} was moved or removed while the run went on; {where}")

    @property
    def result_is_changed(self) -> bool:
        """Whether the figures, which can be read, are not those that were written."""
        return is_changed(self.result_file) and _read_json(self.result_file) is not None

    def read_config(self) -> dict[str, Any] | None:
        """The content of config.json; where that is not what was written, what result.json has recorded of it."""
        recorded = self.recorded_config
        return _read_json(self.config_file) if recorded is None else {"schema_version": SCHEMA_VERSION, **recorded}

    @property
    def recorded_config(self) -> dict[str, Any] | None:
        """What stands in for config.json, None if nothing has to or can."""
        if not is_changed(self.config_file) or is_changed(self.result_file):
            return None
        recorded = (_read_json(self.result_file) or {}).get("config")
        return recorded if isinstance(recorded, dict) else None

    def write_config(self, content: dict[str, Any]) -> None:
        replace_hashed(self.config_file, _as_json(content))

    def newest_checkpoints(self) -> dict[str, Path]:
        """Of each task that has one."""
        tasks = {path.parent.name: path.parent for path in self.path.glob("*/checkpoint-*")}
        return {name: found[-1] for name, task in tasks.items() if (found := checkpoints(task))}

    def remove_leftovers(self) -> None:
        """Remove what a run that was killed has left half written or half removed."""
        for path in self.path.rglob(".*.tmp"):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _as_json(content: Any) -> str:
    return json.dumps(content, indent=2) + "\n"


def _read_json(file: Path) -> dict[str, Any] | None:
    """None for what is no JSON object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def new_folder(output_dir: str | None, *, default: Path, advice: str = "") -> Path:
    """Make `output_dir`, which must be new or empty, or else an unused folder like `default`. Raises UserError."""
    path = Path(output_dir) if output_dir is not None else default
    try:
        if output_dir is None:
            path = _unused(path)
        path.mkdir(parents=True, exist_ok=True)
        if any(one.name not in LEFT_AT_THE_START for one in path.iterdir()):
            raise UserError(f"output folder {path} is not empty; choose another one{advice}")
        probe = path / ".probe.tmp"
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
    raise UserError(f"output folder {path} and 998 numbered ones after it exist already; choose another --output-dir")


def is_checkpoint(path: Path) -> bool:
    return re.fullmatch(r"checkpoint-\d+", path.name) is not None and path.is_dir()


def checkpoints(task_folder: Path) -> list[Path]:
    """The whole checkpoints of a task, oldest first."""
    return sorted(filter(is_checkpoint, task_folder.glob("checkpoint-*")), key=step_of)


def remove_folder(folder: Path) -> None:
    """Remove a folder if it is there. One that is half removed does not have its name any more."""
    removed = folder.with_name(f".{folder.name}.removed.tmp")
    with suppress(FileNotFoundError):
        shutil.rmtree(removed, ignore_errors=True)
        folder.rename(removed)
        shutil.rmtree(removed)


def step_of(path: Path) -> int:
    """The step in a name such as checkpoint-000050 or step-000050.json."""
    return int(path.stem.rpartition("-")[2])


def versions() -> dict[str, str]:
    """The versions of what computed the figures in result.json and evaluation.json."""
    packages = {name: metadata.version(name) for name in ("torch", "transformers")}
    return {"mr1fast": __version__, **packages, "python": platform.python_version()}


def write_json(path: Path, content: Any) -> None:
    write_text(path, _as_json(content))


def write_config(folder: RunFolder, config: TrainConfig) -> None:
    """Write config.json; a resumed run changes no more than CHANGEABLE in it. The output folder is not recorded."""
    options = {name: value for name, value in config.resolved().items() if name != "output_dir"}
    recorded = folder.read_config() or {"schema_version": SCHEMA_VERSION, **options}
    recorded.pop("output_dir", None)
    changed = recorded | {name: options[name] for name in CHANGEABLE if name in options}
    if changed != _read_json(folder.config_file):
        folder.write_config(changed)


def record_max_steps(folder: RunFolder, task: str, *, step: int, before: int, now: int) -> None:
    """Add to config.json that up to this step the schedules were those of another total."""
    content = folder.read_config() or {}
    earlier = [one for one in content.get("max_steps_changes", []) if one["task"] != task or one["after_step"] < step]
    change = {"task": task, "after_step": step, "from": before, "to": now}
    folder.write_config(content | {"max_steps_changes": [*earlier, change]})
