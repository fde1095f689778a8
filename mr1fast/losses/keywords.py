"""How a function takes the options of the loss as keywords: checked, with defaults, and named in its signature."""

import inspect
import textwrap
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_type_hints

import torch

from mr1fast.checks import nearest
from mr1fast.losses.options import OPTIONS, LossOptions

Function = TypeVar("Function", bound=Callable[..., Any])
_TYPES = get_type_hints(LossOptions)
_DEFAULTS = {name: option.check(name, option.default) for name, option in OPTIONS.items()}


def _default(name: str) -> Any:
    return _DEFAULTS[name]


# What torch.compiler.assume_constant_result does, without importing the compiler: a default is a constant of the graph.
# By itself torch.compile(dynamic=True) takes a number that it finds in a global for an input.
_default._dynamo_marked_constant = True  # type: ignore[attr-defined]


class UnknownOption(ValueError, TypeError):
    """An unknown keyword: a ValueError like any bad argument of the loss, and a TypeError as Python itself raises."""


def checked(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options given to the function, each with its value checked and converted to the form that the loss needs."""
    values = {}
    for name, value in options.items():
        if name not in OPTIONS:
            raise UnknownOption(_unknown(function, name))
        values[name] = OPTIONS[name].check(name, value)
    return values


def completed(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """`checked`, with the defaults of the other options."""
    defaults = {name: _default(name) for name in OPTIONS} if torch.compiler.is_compiling() else _DEFAULTS
    return {**defaults, **checked(function, options)}


def _unknown(function: Callable[..., Any], name: str) -> str:
    known = inspect.signature(function).parameters
    near = nearest(name, known) or f"; its keywords are {', '.join(known)}"
    return f"{function.__name__} got an unexpected keyword argument {name!r}{near}"


def spelled_out(function: Function) -> Function:
    """Lets `inspect.signature` and `help` show what `**options: Unpack[LossOptions]` tells type checkers by itself.

    The meanings of the options go into the docstring, behind the line "**options: ...".
    """
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=_TYPES[name])
        for name, option in OPTIONS.items()
    ]
    positional = [p for p in own if p.kind is not p.KEYWORD_ONLY]
    keywords = [p for p in own if p.kind is p.KEYWORD_ONLY]
    function.__signature__ = signature.replace(parameters=[*positional, *options, *keywords])  # type: ignore[attr-defined]
    if function.__doc__:
        lines = function.__doc__.split("\n")
        at = next(i for i, line in enumerate(lines) if line.lstrip().startswith("**options:"))
        indent = lines[at][: -len(lines[at].lstrip())]
        for name, option in reversed(OPTIONS.items()):
            text = textwrap.fill(
                f"{name}: {option.meaning}", 120, initial_indent=indent, subsequent_indent=indent + "    "
            )
            lines.insert(at + 1, text)
        function.__doc__ = "\n".join(lines)
    return function
