"""Checks of single values, and what a user is told about a wrong one. Imports no torch."""

from __future__ import annotations

import difflib
import math
import numbers
import operator
from collections.abc import Iterable
from typing import Any

from mr1fast.errors import UserError

_MOST = 2**1023  # Python makes no float of a greater integer
_NUMBERS = (int, float, numbers.Real)  # numpy's numbers are Real; the question is faster in this order


def number(name: str, value: Any, *, above: float | None = None, at_least: float | None = None) -> float:
    """A finite number within the bound as a float, or ValueError. numpy's numbers are numbers, bools are not."""
    wanted = f" > {above}" if above is not None else f" >= {at_least}" if at_least is not None else ""
    if isinstance(value, bool) or not isinstance(value, _NUMBERS):
        raise ValueError(f"{name} must be a number{wanted}, got {described(value)}")
    result = math.inf if isinstance(value, int) and abs(value) > _MOST else float(value)
    if (
        not -math.inf < result < math.inf  # math.isfinite cannot be traced with dynamic=True
        or (above is not None and result <= above)
        or (at_least is not None and result < at_least)
    ):
        raise ValueError(f"{name} must be a finite number{wanted}, got {result}")
    return result


def integer(name: str, value: Any, *, at_least: int) -> int:
    """A whole number within the bound as an int, or ValueError.

    It may be Python's, numpy's or torch's (0-d), or a float without a fraction (8.0, as a division makes it), but not
    a bool.
    """
    whole: int = value if type(value) is int else _whole(name, value, at_least)
    if whole < at_least:
        raise ValueError(f"{name} must be an integer >= {at_least}, got {described(whole)}")
    return whole


def _whole(name: str, value: Any, at_least: int) -> int:
    is_bool = isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")
    is_float = isinstance(value, _NUMBERS) and not isinstance(value, numbers.Integral)
    if not is_bool and not (is_float and value % 1 != 0):
        try:
            return int(float(value)) if is_float else operator.index(value)
        except (TypeError, ValueError):  # not a number, or a tensor of more than one
            pass
    raise ValueError(f"{name} must be an integer >= {at_least}, got {described(value)}")


def pairs(text: str, source: str, example: str) -> dict[str, str]:
    """key -> value of "key=value,key=value". Raises UserError, which calls the text `source`, for any other form."""
    found: dict[str, str] = {}
    for part in _parts(text):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not key or not value:
            raise UserError(f"{source} must be of the form {example}, got {text!r}")
        if key in found:
            raise UserError(f"{source} names {key} twice")
        found[key] = value
    return found


def _parts(text: str) -> list[str]:
    """What stands between commas, those in brackets and braces excepted."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {described(value)}")
    return value


def choice(name: str, value: Any, known: Iterable[str]) -> str:
    known = tuple(known)
    if not isinstance(value, str) or value not in known:
        raise ValueError(not_one_of(name, value, known))
    return value


def described(value: Any) -> str:
    """dtype and shape of a tensor or an array; else the value itself, if it is short."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        kind = "" if type(value).__name__ == "Tensor" else f"{type(value).__name__} "
        return f"{kind}{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        text = ""
    return text if 0 < len(text) <= 80 else f"a {type(value).__name__}"


def nearest(name: object, known: Iterable[str]) -> str:
    """ " (did you mean 'X'?)", or nothing."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def not_one_of(name: str, value: object, known: Iterable[str]) -> str:
    known = list(known)
    hint = nearest(value, known) if isinstance(value, str) else ""
    return f"{name} must be one of {', '.join(known)}, got {described(value)}{hint}"
