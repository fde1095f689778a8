"""Where in the training program a fault happens: at a call of one of its functions, or at an operation on a file."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

PLACES = {
    "a checkpoint": ("mr1fast.training.loop", "save_checkpoint"),
    "the trained model": ("mr1fast.training.loop", "save_model"),
    "an evaluation": ("mr1fast.evaluation.evaluate", "_Asked.answers"),
    "drawing": ("mr1fast.training.page", "Page._write"),
    "the pictures": ("mr1fast.training.loop", "draw_pictures"),
    "sampling": ("mr1fast.training.trainer", "Trainer._sample"),
    "an update": ("mr1fast.training.trainer", "Trainer.update"),
}
FILE = "a file"  # every file or folder in the run that is opened for writing, renamed, made or removed
_CHANGES = {"os.rename": 2, "os.remove": 1, "os.mkdir": 1, "os.rmdir": 1}  # audit event -> paths among its arguments


def install(
    run: Path,
    *,
    place: str = "",
    call: int = 0,
    harm: Callable | None = None,
    record: Path | None = None,
    places: dict[str, tuple[str, str]] = PLACES,
) -> None:
    """Do `harm(run)` at the call of this number (from 0 on) of a place. record: gets the seconds of every call."""
    seconds: dict[str, list] = {}
    run = Path(os.path.realpath(run))

    def begins(name: str, what: object = None) -> None:
        calls = seconds.setdefault(name, [])
        calls.append(what)
        if harm is not None and (name, len(calls) - 1) == (place, call):
            harm(run)

    for name, (module, path) in places.items():
        *owners, attribute = path.split(".")
        owner = import_module(module)
        for one in owners:
            owner = getattr(owner, one)
        setattr(owner, attribute, _watched(getattr(owner, attribute), name, begins, seconds, record))
    sys.addaudithook(_file_watch(run, begins))


def _watched(function, name, begins, seconds, record):
    def watched(*arguments, **keywords):
        began = time.perf_counter()
        begins(name)
        number = len(seconds[name]) - 1
        try:
            return function(*arguments, **keywords)
        finally:
            seconds[name][number] = time.perf_counter() - began
            if record is not None:
                record.write_text(json.dumps(seconds))

    return watched


def _file_watch(run: Path, begins: Callable) -> Callable:
    """An audit hook. Libraries in C++ and Rust open files without it: theirs are within calls of PLACES."""
    prefix = f"{run}{os.sep}"
    busy = False

    def hook(event: str, arguments: tuple) -> None:
        nonlocal busy
        if busy or not (event == "open" or event in _CHANGES):
            return
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        path = arguments[0]
        if isinstance(path, int) or b"tfevents" in os.fsencode(path):  # TensorBoard opens its file for every number
            return
        busy = True  # what is done here is no operation of the program's
        try:
            if (full := os.path.abspath(os.fsdecode(path))).startswith(prefix):
                begins(FILE, full.removeprefix(prefix))
        finally:
            busy = False

    return hook


# ---- harm -----------------------------------------------------------------------------------------------------------


def kill(run: Path, after: float = 0.0) -> None:
    """kill -9, so many seconds from now."""
    if after <= 0:
        os.kill(os.getpid(), signal.SIGKILL)
    later(run, f"sleep {after:.4f}; kill -9 {{}}")


def later(run: Path, script: str) -> None:
    """Have a shell do this meanwhile. {}: the number of the process."""
    subprocess.Popen(["sh", "-c", script.format(os.getpid())], start_new_session=True)


def fill_disk(run: Path, left: int) -> None:
    """Leave so many bytes on the disk that the run's folder is on."""
    disk = os.statvfs(run.parent)
    if (size := disk.f_bavail * disk.f_frsize - left) > 0:
        with open(run.parent / "filler", "wb") as filler:
            os.posix_fallocate(filler.fileno(), 0, size)


def read_only(run: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", run.parent], check=True)


def vanish(run: Path) -> None:
    run.rename(run.with_name("elsewhere"))


def jump_clock(run: Path, seconds: float) -> None:
    """From now on the clock is wrong by so much."""
    right = time.time
    time.time = lambda: right() + seconds
