"""Which folder and which options does a run have? Either new ones, or those of the run that is resumed.

Imports no torch, so that a mistake is reported at once.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mr1fast.checks import nearest
from mr1fast.data.sources import is_hub_name
from mr1fast.data.tasks import TASKS
from mr1fast.errors import UserError
from mr1fast.options.config import TrainConfig, canonical
from mr1fast.options.config_file import read_options, say_unknown
from mr1fast.options.fields import option_string
from mr1fast.options.parse import FIELDS, Request
from mr1fast.options.reward_weights import load_rewards
from mr1fast.training.loggers import check_installed
from mr1fast.training.processes import ALONE, Processes
from mr1fast.training.run_folder import (
    CHANGEABLE,
    RUNS,
    STATE,
    ResumeError,
    RunFolder,
    is_checkpoint,
    new_folder,
    step_of,
)

PIECES = ("gradient_accumulation_steps", "tokens_per_microbatch")


@dataclass(frozen=True)
class OpenRun:
    folder: RunFolder
    config: TrainConfig
    checkpoint: Path | None = None  # the one to continue from if the user named one; else the newest of each task
    processes: Processes = ALONE
    data_moved: bool = False  # whether the data of a resumed run is in another place now

    def names_checkpoint_of(self, task: str) -> bool:
        return self.checkpoint is not None and self.checkpoint.parent.name == task


@contextmanager
def open_run(request: Request, processes: Processes = ALONE) -> Iterator[OpenRun]:
    """The requested run, which no other program can open at the same time. Raises UserError.

    processes: of this program. The main one opens it for all of them.
    """
    if not processes.is_main:
        yield replace(processes.from_main(None), processes=processes)
        return
    with ExitStack() as stack:
        try:
            opened = stack.enter_context(_opened(request))
        except (UserError, OSError) as error:
            processes.from_main(error)
            raise
        processes.from_main(opened)
        yield replace(opened, processes=processes)


@contextmanager
def _opened(request: Request) -> Iterator[OpenRun]:
    if request.config is not None:
        opened = _new_run(request.config)
    else:
        opened = _resumed_run(request)
    with _locked(opened.folder.path):
        opened.folder.remember()
        opened.folder.remove_leftovers()
        _say_what_is_damaged(opened.folder)
        yield opened


def requested_config(request: Request) -> TrainConfig:
    """The options of the requested run, without opening it. Raises UserError."""
    if request.config is None:
        return _resumed_config(request, _recorded_config(_find_run(request)[0]))
    _check_paths(request.config)
    return request.config


def _new_run(config: TrainConfig) -> OpenRun:
    _check_paths(config)
    load_rewards(config.rewards)
    check_installed(config.loggers)
    default = RUNS / time.strftime("%Y-%m-%d-%H-%M-%S")
    return OpenRun(
        RunFolder(new_folder(config.output_dir, default=default, advice=", or continue with --resume")), config
    )


def _check_paths(config: TrainConfig) -> None:
    check_data_paths(config.data, config.image_root)
    for option, model in (("--model", config.model), ("--reference-model", config.reference_model)):
        if model is not None and model.startswith((".", "/")) and not os.path.isdir(model):
            raise UserError(f"{option} {model} is not a folder")  # else it may be a name on the hub
    for source in config.test_sources:
        if source not in TASKS and not os.path.exists(source) and not is_hub_name(source):
            raise UserError(f"--test-data {source} does not exist{nearest(source, TASKS)}")


def check_data_paths(data: str | None, image_root: str | None) -> None:
    """Raises UserError for what is not there."""
    if data is not None and not os.path.exists(data) and not is_hub_name(data):
        raise UserError(f"--data {data} does not exist")
    if image_root is not None and not os.path.isdir(image_root):
        raise UserError(f"--image-root {image_root} is not a folder")


# ---- a run that is resumed ------------------------------------------------------------------------------------------


def _resumed_run(request: Request) -> OpenRun:
    folder, checkpoint = _find_run(request)
    recorded = _recorded_config(folder)
    config = _resumed_config(request, recorded)
    moved = (config.data, config.image_root) != (recorded.data, recorded.image_root)
    opened = OpenRun(folder, config, checkpoint, data_moved=moved)
    _check_max_steps(opened, recorded)
    try:
        check_data_paths(config.data, config.image_root)
    except UserError as error:
        raise UserError(f"{error}; if it has moved, say with that option where it is now") from None
    load_rewards(config.rewards)
    check_installed(config.loggers)
    return opened


def _find_run(request: Request) -> tuple[RunFolder, Path | None]:
    """The run in DIR, or the run whose checkpoint DIR is; without DIR the run with the newest checkpoint."""
    output_dir = request.given.get("output_dir")
    if not request.resume:
        return _newest_run(RUNS if output_dir is None else Path(output_dir)), None
    path = Path(request.resume)
    if not os.path.isdir(path):
        raise UserError(f"--resume {path}: there is no such folder")
    checkpoint = path.absolute() if is_checkpoint(path) else None
    run = path if checkpoint is None else checkpoint.parent.parent
    if not (run / "config.json").is_file():
        raise UserError(f"nothing to resume: {path} is neither a run nor a checkpoint of one")
    if output_dir is not None and not Path(run).resolve().is_relative_to(Path(output_dir).resolve()):
        raise UserError(
            f"--resume {path} continues in its own folder, and --output-dir {output_dir} is another; leave that out"
        )
    return RunFolder(run), checkpoint


def _newest_run(root: Path) -> RunFolder:
    found = [path for pattern in ("*/checkpoint-*", "*/*/checkpoint-*") for path in root.glob(pattern)]
    checkpoints = [path for path in found if is_checkpoint(path)]
    if not checkpoints:
        raise UserError(f"nothing to resume: there is no checkpoint under {root}")
    return RunFolder(max(checkpoints, key=lambda checkpoint: checkpoint.stat().st_mtime_ns).parent.parent)


def _recorded_config(folder: RunFolder) -> TrainConfig:
    """The options that config.json records."""
    options, unknown = read_options(_read_config(folder), str(folder.config_file))
    options.pop("output_dir", None)  # where the run was begun, if result.json stands in for config.json
    try:
        config = TrainConfig(**options)
    except UserError as error:
        raise UserError(f"{folder.config_file}: {error}") from None
    say_unknown(str(folder.config_file), unknown)
    return config


def _resumed_config(request: Request, config: TrainConfig) -> TrainConfig:
    """The recorded options, updated with the given ones. Raises UserError for one that a resumed run cannot change."""
    recorded, given = config.resolved(), dict(request.given)
    given.pop("output_dir", None)
    for name, value in given.items():
        changeable = name in CHANGEABLE and (name == "max_steps" or config.data is not None)
        if changeable or FIELDS[name].metadata["machine"]:
            continue
        if canonical(name, value) != recorded.get(name):
            differs = f"{option_string(name)} was {recorded.get(name, 'not set')} there, but is {value} now"
            if name == "epochs":
                differs = f"--epochs is recorded there as --max-steps {recorded.get('max_steps')}; give that instead"
            raise UserError(f"--resume continues with the run's own options: {differs}")
    if isinstance(steps := given.get("max_steps"), Mapping):
        given["max_steps"] = {name: config.for_task(name).max_steps for name in config.names} | dict(steps)
    for one, other in (PIECES, PIECES[::-1]):  # they exclude each other
        if one in given and other not in given:
            given[other] = None
    given |= {name: canonical(name, given[name]) for name in CHANGEABLE if isinstance(given.get(name), str)}
    return dataclasses.replace(config, **given)


def _check_max_steps(opened: OpenRun, recorded: TrainConfig) -> None:
    """Raises UserError if --max-steps is too small, or larger where there is nothing to continue from."""
    newest, folder = opened.folder.newest_checkpoints(), opened.folder
    for task in recorded.tasks or [*newest, *(path.parent.name for path in folder.path.glob("*/model"))]:
        steps, before = (config.for_task(task).max_steps for config in (opened.config, recorded))
        checkpoint = opened.checkpoint if opened.names_checkpoint_of(task) else newest.get(task)
        if steps == before:
            continue
        if checkpoint is None and folder.model(task).exists():
            raise UserError(f"--max-steps {steps}: training on {task} has finished, and no checkpoint of it is left")
        if checkpoint is not None and steps < step_of(checkpoint):
            done = f"{task} has done {step_of(checkpoint)} steps"
            raise UserError(
                f"--max-steps {steps} is too small: {done}; an earlier checkpoint may be named with --resume"
            )


def _read_config(folder: RunFolder) -> dict[str, Any]:
    content, file = folder.read_config(), folder.config_file
    if content is None or not isinstance(content.get("schema_version"), int):
        why = "it is damaged, or an older version of mr1fast wrote it"
        raise UserError(f"nothing to resume: {file} is not the configuration of a run ({why})")
    return content


def _say_what_is_damaged(folder: RunFolder) -> None:
    """Of the files that are no checkpoint's."""
    if folder.recorded_config is not None:
        instead = f"the run goes on with the options that {folder.result_file.name} has recorded"
        print(f"warning: {folder.config_file} is not what was written; {instead}", file=sys.stderr)
    if folder.result_is_changed:
        advice = "its figures may be wrong; move it away, and --resume evaluates again"
        print(f"warning: {folder.result_file} is not what was written, and {advice}", file=sys.stderr)


def how_to_train_longer(folder: RunFolder) -> str:
    """Advice to append to an error."""
    if any((checkpoint / STATE).exists() for checkpoint in folder.newest_checkpoints().values()):
        return f"; to train longer: --resume {folder.path} --max-steps N"
    models = sorted(folder.path.glob("*/model"))
    return f"; to train longer, start a new run from its model: --model {models[0]}" if models else ""


def how_to_continue(folder: RunFolder) -> str:
    """What to say of a run that ends early."""
    for task, checkpoint in folder.newest_checkpoints().items():
        if not (checkpoint / STATE).exists() and not folder.model(task).exists():
            return f"training cannot be continued from {checkpoint}, which holds the model alone (--save-only-model)"
    return f"to continue: python -m mr1fast.train --resume {folder.path}"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Raises ResumeError if another process uses the folder. The system unlocks it however the process ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ResumeError(f"another process is training in {folder}") from None
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(descriptor)
