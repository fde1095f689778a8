"""math-verify, in a process of its own: a formula which sympy chokes on costs seconds and never the run.

math-verify's own time limit is a signal, which cannot interrupt sympy at work on one huge integer, and does not exist
in threads.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction
from functools import cache
from importlib.util import find_spec
from typing import Any

from mr1fast.errors import UserError
from mr1fast.rewards.process import START_SECONDS, BrokenWorker, Unanswered, Worker

ANSWER_SECONDS = 5.0
ATTEMPTS = 2
MAX_MEMORY = 4 << 30  # bytes
DIGITS = 30
TOLERANCE = 1e-20  # relative


class BrokenMathVerify(BrokenWorker):
    """math-verify is installed and does not work."""


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
    return _ask(_compare, first, second)


def verifies(text: str, truth: str) -> bool:
    """math-verify's verdict of a whole text, in which it looks for an answer as it likes, and the true answer.

    Raises as `equal` does.
    """
    return _ask(_verify, text, truth)


def _ask(judge: Callable[[str, str], bool], first: str, second: str) -> bool:
    if (package := missing()) is not None:
        _warn_once(package)
        raise Unanswered(f"{package} is not installed")
    for _ in range(ATTEMPTS):
        try:
            return _state.ask(_judge, judge, first, second, seconds=ANSWER_SECONDS, start=START_SECONDS)
        except BrokenMathVerify as error:
            raise UserError(
                f"math-verify is installed but does not work ({error}): pip install -U math-verify"
            ) from error
        except Unanswered as error:
            unanswered = error
    _state.unanswered += 1
    raise unanswered


def unanswered() -> int:
    """How many of this program's questions math-verify has not answered; those answers counted as wrong."""
    return _state.unanswered


def unanswered_summary() -> str:
    """One line for the end of a program."""
    return f"{unanswered()} x math-verify failed twice to say whether an answer is right; these count as wrong"


# ---- in the other process -----------------------------------------------------------------------------------------

_broken = ""  # why math-verify does not work


def _prepare() -> None:
    """Import math-verify, and try it on formulas that are equal, and on some that are not."""
    global _broken
    import logging

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


_state = Worker(_prepare)


def _judge(judge: Callable[[str, str], bool], first: str, second: str) -> bool:
    if _broken:
        raise BrokenMathVerify(_broken)
    try:
        return judge(first, second)
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


def _verify(text: str, truth: str) -> bool:
    from math_verify import parse, verify

    found, wanted = (parse(one, parsing_timeout=None) for one in (text, truth))
    return bool(verify(found, wanted, timeout_seconds=None))
