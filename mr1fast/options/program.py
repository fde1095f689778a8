"""What the small programs share: for a mistake they print one sentence and exit with code 2, never with a traceback."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mr1fast.checks import nearest
from mr1fast.errors import UserError
from mr1fast.options.fields import GREATEST

NO_BREAK = "\N{NO-BREAK SPACE}"
IS_CHECKOUT = (Path(__file__).parents[2] / "Makefile").is_file()


def prog(module: str) -> str:
    """How the user started that program: `mr1fast train` (see mr1fast/__main__.py) or `python -m mr1fast.train`."""
    return sys.argv[0] if sys.argv[0].startswith("mr1fast ") else f"python -m mr1fast.{module}"


class _Lines(argparse.HelpFormatter):
    """Each line of a help text begins on a line of its own, and none with an option that it only mentions."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        lines: list[str] = []
        for line in text.splitlines():
            bound = re.sub(r" (?=--\w)", NO_BREAK, line)
            lines += [part.replace(NO_BREAK, " ") for part in super()._split_lines(bound, width)]
        return lines


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError, and suggests the option that was meant."""

    def __init__(self, **keywords: Any):
        super().__init__(**{"formatter_class": _Lines, **keywords})

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def parse(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        known, unknown = self.parse_known_args(arguments)
        if unknown:
            name = unknown[0].partition("=")[0]
            options = [option for action in self._actions for option in action.option_strings]
            what = "option" if name.startswith("-") else "argument"
            raise UserError(f"unknown {what} {name}{nearest(name, options)}; --help lists the options")
        return known


def at_least(bound: int) -> Callable[[str], int]:
    """An argparse type: a whole number that is at least `bound`."""

    def whole_number(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
        if number < bound:
            raise argparse.ArgumentTypeError(f"must be at least {bound}, got {number}")
        if number > GREATEST:
            raise argparse.ArgumentTypeError(f"must be at most {GREATEST}, got {number}")
        return number

    return whole_number


def check_one_process(what: str, instead: str = "") -> None:
    """Raises UserError under torchrun and its kin, where each process would do the same work by itself."""
    if (number := os.environ.get("WORLD_SIZE", "")).isdecimal() and int(number) > 1:
        advice = f"; {instead}" if instead else ""
        raise UserError(
            f"WORLD_SIZE is {number}, but {what} runs in one process, on one device: start it without torchrun or "
            f"accelerate launch{advice}"
        )


def missing_package(error: ModuleNotFoundError, extra: str = "train") -> str:
    """Which package of that extra is missing, and the command that installs it."""
    command = "'make setup', then 'source .venv/bin/activate'"
    if not IS_CHECKOUT:
        # mr1fast itself is there already, so pip adds what the extra lists and looks for no other mr1fast.
        command = f"'{sys.executable} -m pip install \"mr1fast[{extra}]\"'"
    return f"the package {error.name!r} is not installed for {sys.executable}; run {command}"


def exit_code(program: Callable[[Sequence[str] | None], None], arguments: Sequence[str] | None) -> int:
    """Run a program; the exit code is 0, 2 for a mistake of the user's (a ValueError, printed), or 130 after Ctrl-C."""
    try:
        program(arguments)
    except ModuleNotFoundError as error:
        print(f"error: {missing_package(error)}", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped by Ctrl-C", file=sys.stderr)
        return 130
    return 0
