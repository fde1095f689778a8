"""What ends a program early: Ctrl-C and SIGTERM, after which a step is finished and saved, and too little memory."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any]


class Stopped(BaseException):
    """The run was asked to stop. Like KeyboardInterrupt, no `except Exception` may swallow it."""

    def __init__(self, signal_number: int):
        super().__init__(signal.Signals(signal_number).name)
        self.exit_code = 128 + signal_number


def is_out_of_memory(error: BaseException) -> bool:
    """Of Python, of torch on a GPU, or of torch on a CPU."""
    on_gpu = type(error).__name__ == "OutOfMemoryError"  # torch's, without importing it
    return isinstance(error, MemoryError) or on_gpu or "can't allocate memory" in str(error)


@contextmanager
def stop_on_sigterm() -> Iterator[None]:
    """SIGTERM raises Stopped, as Ctrl-C raises KeyboardInterrupt."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    with _handlers({signal.SIGTERM: stop}):
        yield


class StopRequest:
    """What `finishing_steps` yields: the first signal, which the loop checks after each step."""

    signal_number: int | None = None


@contextmanager
def finishing_steps() -> Iterator[StopRequest]:
    """The first Ctrl-C or SIGTERM is only noted; the second one stops at once."""
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        if request.signal_number is not None:
            raise Stopped(number)
        request.signal_number = number
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
