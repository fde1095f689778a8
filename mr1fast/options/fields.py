"""How an option is declared, named and checked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from mr1fast.checks import not_one_of
from mr1fast.errors import UserError

GREATEST = 2**63 - 1  # the largest integer that torch accepts
MANY = 10**9  # steps: more than any run can take
# How --help shows a value that has parts.
LIST = "LIST"
PAIRS = "KEY=VALUE,..."
# YAML's words for a switch.
SWITCH = {"yes": True, "true": True, "on": True, "no": False, "false": False, "off": False}


def option(
    default: Any,
    help: str,
    *,
    group: str,
    key_of: str = "",
    metavar: str = "",
    unit: str = "",
    choices: Sequence[str] | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    why: str = "",
    shown: str | None = None,
    machine: bool = False,
    several: bool = False,
    blank: bool = False,
) -> Any:
    """A field of a dataclass of options.

    group: the heading in --help under which it is listed. key_of: the option of which it is a key, see keyed.py. why:
    the reason for its bounds, given in the error for a value outside them. shown: the default as --help gives it, if
    that is not the value itself. machine: the option says where a run computes, not what, so that a resumed run may use
    another value. several: it may be given several times. blank: it may be a text of nothing.
    """
    said = {"help": help, "group": group, "key_of": key_of, "metavar": metavar, "unit": unit, "shown": shown}
    bounds = {"choices": choices, "at_least": at_least, "at_most": at_most, "below": below, "why": why, "blank": blank}
    return dataclasses.field(default=default, metadata={**said, **bounds, "machine": machine, "several": several})


def option_string(name: str) -> str:
    """The option on the command line: --max-steps for max_steps."""
    return "--" + name.replace("_", "-")


def check_choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(not_one_of(name, value, known))


def check_value(field: dataclasses.Field, value: Any, name: str) -> None:
    """Raises UserError, in which the option is called `name`, for a value that is out of its range."""
    limits = field.metadata
    if limits["choices"] is not None:
        check_choice(name, value, limits["choices"])
    if isinstance(value, str):
        if not (value.strip() or limits["blank"]) or "\0" in value:
            raise UserError(f"{name} must be text, got {value!r}")
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} must be a finite number, got {value}")
    at_most = limits["at_most"]
    if at_most is None and isinstance(value, int):
        at_most = GREATEST
    for bound, words, holds in (
        (limits["at_least"], "at least", lambda bound: value >= bound),
        (at_most, "at most", lambda bound: value <= bound),
        (limits["below"], "below", lambda bound: value < bound),
    ):
        if bound is not None and not holds(bound):
            limit = f"{bound:,}" if isinstance(bound, int) and bound < GREATEST else f"{bound}"
            why = f": {limits['why']}" if limits["why"] else ""
            raise UserError(f"{name} must be {words} {limit}, got {shortened(value)}{why}")


def shortened(value: Any) -> str:
    """A number as it was given, unless it fills the screen."""
    text = str(value)
    return text if len(text) <= 40 else f"a number of {len(text)} digits"
