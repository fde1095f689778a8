"""What ends a program early: Ctrl-C and SIGTERM, after which a step is finished and saved, and too little memory."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from mr1fast.errors import UserError
from mr1fast.options.config import TaskConfig, TrainConfig

Handler = Callable[[int, FrameType | None], Any]


class Stopped(BaseException):
    """The run was asked to stop. Like KeyboardInterrupt, no `except Exception` may swallow it."""

    def __init__(self, signal_number: int):
        super().__init__(signal.Signals(signal_number).name)
        self.exit_code = 128 + signal_number


# What torch, CUDA and C++ say when memory runs out, on Linux and elsewhere.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed", "bad_alloc")


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether too little memory is the error, or the cause of it. The text of a UserError, being ours, is no sign."""
    while error is not None:
        text = "" if isinstance(error, UserError) else str(error).lower()
        if isinstance(error, MemoryError) or any(words in text for words in _OUT_OF_MEMORY):
            return True
        error = error.__cause__
    return False


def too_little_memory(config: TrainConfig) -> str:
    """One sentence, which names the options that would help and are not in use yet."""
    tasks, frozen = [config.for_task(name) for name in config.names], config.frozen_parts
    smaller = [*(["--max-completion-length", "--num-generations"] * (config.method != "sft")), "--prompts-per-step"]
    remedies = {
        "--lora-rank 16": not config.trains_adapter and "language" not in frozen,
        "--freeze vision": not config.trains_adapter and "vision" not in frozen,
        "--gradient-checkpointing on": config.gradient_checkpointing != "on",
        "a larger --gradient-accumulation-steps": any(_could_be_more(task) for task in tasks),
        "a smaller --tokens-per-microbatch": any(task.tokens_per_microbatch is not None for task in tasks),
        f"smaller values of {', '.join(smaller)} or --max-pixels": True,
    }
    tried = ", ".join(remedy for remedy, helps in remedies.items() if helps)
    may_change = (
        "--gradient-checkpointing, --gradient-accumulation-steps, --tokens-per-microbatch and --eval-batch-size"
    )
    changed = f"{may_change} may change at --resume, the others need a new run"
    return f"there is too little memory; try {tried} or, in an evaluation, a smaller --eval-batch-size; {changed}"


def _could_be_more(task: TaskConfig) -> bool:
    return task.gradient_accumulation_steps not in (None, task.prompts_per_step)


@contextmanager
def stop_on_sigterm() -> Iterator[None]:
    """SIGTERM raises Stopped, as Ctrl-C raises KeyboardInterrupt."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    with _handlers({signal.SIGTERM: stop}):
        yield


PASSED_ON = 2.0  # seconds


class StopRequest:
    """What `finishing_steps` yields: the first signal, which the loop checks after each step."""

    signal_number: int | None = None


@contextmanager
def finishing_steps(*, together: bool = False) -> Iterator[StopRequest]:
    """The first Ctrl-C or SIGTERM is only noted; the second one stops at once.

    together: with other processes, whose launcher passes on a Ctrl-C that the terminal has sent to all of them already.
    """
    request = StopRequest()
    noted = 0.0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal noted
        if request.signal_number is not None:
            if together and time.monotonic() - noted < PASSED_ON:
                return
            raise Stopped(number)
        request.signal_number, noted = number, time.monotonic()
        print("\nfinishing this step, then saving (a second Ctrl-C stops at once)", file=sys.stderr)

    with _handlers({signal.SIGINT: note, signal.SIGTERM: note}):
        yield request


@contextmanager
def _handlers(handlers: dict[signal.Signals, Handler]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers nowhere else
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
