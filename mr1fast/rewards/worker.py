"""math-verify in a process of its own, so that a formula which sympy chokes on costs seconds and never the run.

math-verify's own time limit is a signal, which cannot interrupt sympy at work on one huge integer, and does not exist
in threads. Killing a process works everywhere: pebble's pool does that. The process is started by the first question,
and again after one that hung; a forked program starts one of its own.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.process
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import CancelledError
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from fractions import Fraction
from functools import cache
from importlib.util import find_spec
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import TYPE_CHECKING, Any

from mr1fast.errors import UserError

if TYPE_CHECKING:
    from pebble import ProcessPool

START_SECONDS = 60.0  # importing sympy on a busy machine
ANSWER_SECONDS = 5.0
ATTEMPTS = 2
MAX_MEMORY = 4 << 30  # bytes
DIGITS = 30
TOLERANCE = 1e-20  # relative


class Unanswered(Exception):
    """Whether two formulas are equal is not known: math-verify failed, took too long or is not installed."""


class BrokenMathVerify(Exception):
    """math-verify is installed but does not work."""


def missing() -> str | None:
    """The name of a package that is needed here but not installed, or None."""
    return next((name for name in ("math-verify", "pebble") if find_spec(name.replace("-", "_")) is None), None)


@cache
def _warn_once(package: str) -> None:
    warnings.warn(
        f"{package} is not installed: formulas that are not spelt like the solution, such as '2*sqrt(3)' for "
        f"'\\sqrt{{12}}', count as wrong; pip install {package}",
        stacklevel=2,
    )


def equal(first: str, second: str) -> bool:
    """Whether math-verify finds two LaTeX formulas equal.

    Raises Unanswered if it fails twice or is missing, UserError if it is broken.
    """
    if (package := missing()) is not None:
        _warn_once(package)
        raise Unanswered
    for _ in range(ATTEMPTS):
        try:
            return _state.ask(first, second)
        except BrokenMathVerify as error:
            raise UserError(
                f"math-verify is installed but does not work ({error}): pip install -U math-verify"
            ) from error
        except Unanswered:
            continue
    _state.unanswered += 1
    raise Unanswered


def unanswered() -> int:
    """How many of this program's questions math-verify has not answered; those answers counted as wrong."""
    return _state.unanswered


def unanswered_summary() -> str:
    """One line for the end of a program."""
    return f"{unanswered()} x math-verify failed twice to say whether an answer is right; these count as wrong"


# ---- in this process ----------------------------------------------------------------------------------------------


class _State:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.pool: ProcessPool | None = None
        self.unanswered = 0

    def ask(self, first: str, second: str) -> bool:
        """Raises Unanswered and BrokenMathVerify."""
        with self.lock:
            if self.pool is None:
                self.pool = _new_pool()
            try:
                # Each question has a future of its own: one that Ctrl-C cuts short leaves no reply to the next.
                future = self.pool.schedule(_judge, args=(first, second), timeout=ANSWER_SECONDS)
                return future.result(timeout=START_SECONDS + ANSWER_SECONDS)
            except BrokenMathVerify:
                raise
            except TimeoutError as error:
                if not future.done():  # it did not even start
                    self.stop()
                raise Unanswered from error
            except (BrokenProcessPool, RuntimeError, OSError) as error:
                self.stop()
                raise Unanswered from error
            except (Exception, CancelledError) as error:  # what happened in the process
                raise Unanswered from error

    def stop(self) -> None:
        pool, self.pool = self.pool, None
        if pool is not None:
            pool.stop()
            pool.join()


_state = _State()


def _new_pool() -> ProcessPool:
    from pebble import ProcessPool

    return ProcessPool(max_workers=1, initializer=_prepare, context=_Context())


def _forget() -> None:
    """A fork shares the pipes of the process, not its threads: it starts one of its own, and leaves this one alone."""
    global _state
    _state = _State()
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


# ---- in the other process -----------------------------------------------------------------------------------------

_broken = ""  # why math-verify does not work


def _prepare() -> None:
    """Import math-verify, and try it on formulas that are equal, and on some that are not."""
    global _broken
    import logging

    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Python's handler would wait for sympy's current operation
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    logging.disable()
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    try:
        if not _compare(r"\frac{1}{2}\cdot \sqrt{12}", r"\sqrt{3}") or _compare(r"\sqrt{2}", r"\sqrt{3}"):
            _broken = "it does not find \\frac{1}{2}\\sqrt{12} equal to \\sqrt{3}"
    except Exception as error:
        _broken = f"{type(error).__name__}: {error}"


def _judge(first: str, second: str) -> bool:
    if _broken:
        raise BrokenMathVerify(_broken)
    try:
        return _compare(first, second)
    except MemoryError:
        raise
    except Exception:  # whatever sympy trips over, the answer is not right
        return False


def _compare(first: str, second: str) -> bool:
    """math-verify's verdict, which is absolute (everything below 1e-15 is 0), and a relative comparison in numbers."""
    from math_verify import parse, verify

    a, b = (
        parse(f"${text}$", fallback_mode="no_fallback", extraction_mode="first_match", parsing_timeout=None)
        for text in (first, second)
    )
    if not a or not b or not _close(a[0], b[0]):
        return False
    return bool(verify(a, b, timeout_seconds=None))


def _close(a: Any, b: Any) -> bool:
    """Whether two sympy expressions have nearly the same value, with names standing for arbitrary numbers."""
    names = sorted(a.free_symbols | b.free_symbols, key=str)
    numbers = {name: Fraction(7 * i + 11, 5) for i, name in enumerate(names)}
    x, y = (one.subs(numbers).evalf(DIGITS) for one in (a, b))
    return bool(abs(x - y) <= TOLERANCE * max(abs(x), abs(y)))
