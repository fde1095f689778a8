"""What an option of the loss is, and the checks of its values."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from mr1fast.checks import choice, integer, number

Check = Callable[[str, Any], Any]  # (name, value) -> the value as the loss needs it; ValueError if it is wrong


def anything(name: str, value: Any) -> Any:
    """For tensors, whose shapes are not known yet."""
    return value


def one_of(*known: str) -> Check:
    return partial(choice, known=known)


def a_number(*, above: float | None = None, at_least: float | None = None) -> Check:
    return partial(number, above=above, at_least=at_least)


def a_share(name: str, value: Any) -> float:
    share = number(name, value, above=0)
    if share > 1:
        raise ValueError(f"{name} must be a number > 0 and <= 1, got {share}")
    return share


COUNT: Check = partial(integer, at_least=1)


def or_none(name: str, value: Any, *, check: Check, instead: Any = None) -> Any:
    return instead if value is None else check(name, value)


def or_tensor(name: str, value: Any, *, check: Check) -> Any:
    return value if isinstance(value, Tensor) else check(name, value)


class Option(NamedTuple):
    default: Any
    check: Check
    meaning: str
