"""A process of its own for what may hang or die, so that it costs seconds and never the run.

Killing a process is the only time limit that works everywhere: pebble's pool does that. The process is started by the
first question, and again after one that hung; a forked program starts one of its own.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.process
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pebble import ProcessPool

START_SECONDS = 60.0  # importing sympy on a busy machine


class Unanswered(Exception):
    """The process failed or took too long; the message says which."""


class BrokenWorker(Exception):
    """What a process raises that cannot do its work: `Worker.ask` raises it again."""


class Worker:
    """One process that answers questions, one after the other.

    prepare: called in the process before the first question, without a time limit. unanswered: counted by the caller.
    """

    def __init__(self, prepare: Callable[[], None]) -> None:
        self.prepare = prepare
        self.reset()
        _workers.add(self)

    def reset(self) -> None:
        self.lock = threading.Lock()
        self.pool: ProcessPool | None = None
        self.unanswered = 0

    def ask(self, function: Callable[..., Any], *arguments: Any, seconds: float, start: float = START_SECONDS) -> Any:
        """function(*arguments), in the process; both are pickled. `start`: seconds for the process to come up.

        Raises Unanswered, and BrokenWorker where `function` does.
        """
        with self.lock:
            if self.pool is None:
                self.pool = self._new_pool()
            try:
                # Each question has a future of its own: one that Ctrl-C cuts short leaves no reply to the next.
                future = self.pool.schedule(function, args=arguments, timeout=seconds)
                return future.result(timeout=start + seconds)
            except BrokenWorker:
                raise
            except TimeoutError as error:
                if not future.done():  # it did not even start
                    self.stop()
                raise Unanswered(f"took longer than {seconds:g} s") from error
            except (BrokenProcessPool, RuntimeError, OSError) as error:
                self.stop()
                raise Unanswered(_reason(error)) from error
            except (Exception, CancelledError) as error:  # what happened in the process
                raise Unanswered(_reason(error)) from error

    def end(self) -> None:
        """Wait for the question that is being answered, and end the process; the next question starts a new one."""
        with self.lock:
            self.stop()

    def stop(self) -> None:
        pool, self.pool = self.pool, None
        if pool is not None:
            pool.stop()
            pool.join()

    def _new_pool(self) -> ProcessPool:
        from pebble import ProcessPool

        return ProcessPool(max_workers=1, initializer=_begin, initargs=(self.prepare,), context=_Context())


_workers: weakref.WeakSet[Worker] = weakref.WeakSet()


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _begin(prepare: Callable[[], None]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Python's handler would wait for the current operation
    prepare()


def _forget() -> None:
    """A fork shares the pipes of the process, not its threads: it starts one of its own, and leaves this one alone."""
    for worker in _workers:
        worker.reset()
    children = multiprocessing.process._children  # type: ignore[attr-defined]
    children.difference_update([child for child in children if isinstance(child, _Process)])


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


class _Process(SpawnProcess):
    """A spawned process, but one that does not run the user's program a second time, as spawned ones do where that has
    no `if __name__ == "__main__"`; that a DataLoader's worker may start; and that Ctrl-C does not reach."""

    def start(self) -> None:
        self.daemon = True  # ends with this process
        with _without_main(), _may_have_children(), _without_ctrl_c():
            super().start()


class _Context(SpawnContext):
    Process = _Process


@contextmanager
def _without_main() -> Iterator[None]:
    main = sys.modules["__main__"]
    kept = {name: getattr(main, name) for name in ("__spec__", "__file__") if hasattr(main, name)}
    main.__spec__ = main.__file__ = None
    try:
        yield
    finally:
        for name in ("__spec__", "__file__"):
            setattr(main, name, kept[name]) if name in kept else delattr(main, name)


@contextmanager
def _may_have_children() -> Iterator[None]:
    this = multiprocessing.current_process()
    was = this.daemon
    if was:
        this.daemon = False
    try:
        yield
    finally:
        if was:
            this.daemon = True


@contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """What is started here has SIGINT blocked, from its first instruction."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # or it starts meanwhile, and unblocks SIGINT
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
