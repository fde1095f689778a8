"""Reward functions of the user's own: in a process of their own, with a time limit, and never the end of a run.

A reward function has the form of TRL's:

    function(completions: list[str], solutions: list[str], **columns: list) -> list[float | None]

columns: a list as long as `completions` for problem, choices (None where there are none) and every other column of the
data but the image. None and NaN say that a completion has no such reward: it is absent, and so it is where the function
raises, takes longer than SECONDS, or returns something else than a number for each completion.
"""

from __future__ import annotations

import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from typing import Any

from mr1fast.checks import described
from mr1fast.errors import UserError
from mr1fast.rewards.process import START_SECONDS, Unanswered, Worker

RewardFunction = Callable[..., list[float | None]]

SECONDS = 30.0  # for all completions of a step
FORM = "(completions, solutions, **columns) -> list of numbers"


_surroundings: tuple[str, list[str], dict[str, str]] | None = None  # current folder, sys.path and environment


class Absent(Exception):
    """A function has no reward for any completion; the message is the reason."""


class OwnReward:
    """The function `module:function`, called in the other process. The module may be in the current folder."""

    def __init__(self, name: str):
        """Raises UserError where it cannot be imported or takes other arguments."""
        self.name = name
        self.folder = os.getcwd()  # that of the other process may be another one
        try:
            self._ask(_check, START_SECONDS)
        except Absent as error:
            raise UserError(f"the reward {name} {error}") from None

    def __call__(self, completions: list[str], solutions: list[str], **columns: list[Any]) -> list[float | None]:
        """Raises Absent."""
        self._ask(_check, START_SECONDS)  # a process that was killed imports it again, which is not in the time limit
        return self._ask(_call, SECONDS, completions, solutions, columns)

    def check_columns(self, columns: Iterable[str]) -> None:
        """Raises UserError where the function takes a column that is not among these."""
        known = list(columns)
        for column in self._ask(_needed, START_SECONDS):
            if column not in known:
                raise UserError(
                    f"the reward {self.name} takes {column!r}, and the data has no such column; there "
                    f"are {', '.join(known)}"
                )

    def _ask(self, function: Callable[..., Any], seconds: float, *arguments: Any) -> Any:
        try:
            answer, reason = _worker.ask(function, self.name, self.folder, *arguments, seconds=seconds)
        except Unanswered as error:
            raise Absent(str(error)) from None
        if reason:
            raise Absent(reason)
        return answer


def renew_process() -> None:
    """End the other process if it was started with another current folder, path of imports or environment than now.

    It would find other modules, also under the same names, and read other files and variables.
    """
    global _surroundings
    now = os.getcwd(), list(sys.path), dict(os.environ)
    if now != _surroundings:
        _worker.end()
        _surroundings = now


def as_numbers(values: Any, n: int) -> list[float]:
    """What a reward function returned as n numbers, NaN where one is absent. Raises Absent."""
    if isinstance(values, str | bytes | Mapping | AbstractSet) or not isinstance(values, Iterable):
        raise Absent(f"returned {described(values)}, not a list of numbers")
    listed = list(values)
    if len(listed) != n:
        raise Absent(f"returned {len(listed)} values for {n} completions")
    return [_number(value) for value in listed]


def _number(value: Any) -> float:
    if not isinstance(value, str | bytes):
        with suppress(TypeError, ValueError, OverflowError, RuntimeError):
            return float(value)
    return math.nan


# ---- in the other process -------------------------------------------------------------------------------------------


def _nothing() -> None:
    """What a process of users' functions has to prepare."""


_worker = Worker(_nothing)

_Answer = tuple[Any, str]  # what was asked for, or the reason why it cannot be had


def _imported(name: str, folder: str) -> Any:
    module, _, attribute = name.partition(":")
    if folder not in sys.path:  # an installed command does not look there, python -m does
        sys.path.append(folder)
    importlib.invalidate_caches()  # the file may be newer than what Python remembers of its folder
    return getattr(importlib.import_module(module), attribute)


def _check(name: str, folder: str) -> _Answer:
    try:
        function = _imported(name, folder)
    except (Exception, SystemExit) as error:  # whatever the user's module raises
        return None, f"cannot be imported: {_described(error)}"
    if not callable(function):
        return None, f"is not a function, but of type {type(function).__name__}"
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some that are written in C have none
        return None, ""
    try:
        needed: dict[str, list] = {column: [] for column in _columns_of(signature)}
        signature.bind(completions=[], solutions=[], **{"another column": []}, **needed)
    except TypeError:
        return None, f"takes {signature}, and must be a function {FORM}"
    return None, ""


def _columns_of(signature: inspect.Signature) -> Sequence[str]:
    """The columns that are named as parameters without a default."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [
        name
        for name, parameter in signature.parameters.items()
        if parameter.kind in kinds and parameter.default is parameter.empty and name not in ("completions", "solutions")
    ]


def _needed(name: str, folder: str) -> _Answer:
    try:
        return _columns_of(inspect.signature(_imported(name, folder))), ""
    except (TypeError, ValueError):
        return [], ""


def _call(
    name: str, folder: str, completions: list[str], solutions: list[str], columns: dict[str, list[Any]]
) -> _Answer:
    try:
        values = _imported(name, folder)(completions=completions, solutions=solutions, **columns)
        return as_numbers(values, len(completions)), ""
    except Absent as error:
        return None, str(error)
    except (Exception, SystemExit) as error:
        return None, f"raised {_described(error)}"


def _described(error: BaseException) -> str:
    """Type, message and place, in one line."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    file = "<" if traceback is None else traceback.tb_frame.f_code.co_filename
    place = "" if traceback is None or file.startswith("<") else f" ({file}, line {traceback.tb_lineno})"
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}{place}"
