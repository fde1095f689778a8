"""Which options the trainer has, by name, and a value as the command line or a YAML file gives it."""

from __future__ import annotations

import dataclasses
import json
import typing
from typing import Any

from mr1fast.checks import described
from mr1fast.errors import UserError
from mr1fast.options.config import TrainConfig
from mr1fast.options.fields import LIST, PAIRS, SWITCH, check_value
from mr1fast.options.train_options import BY_TASK

FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}
_HINTS = typing.get_type_hints(TrainConfig)
_TYPE_NAMES = {bool: "yes or no", int: "a whole number", float: "a number", str: "text"}


def field_type(name: str) -> type:
    """bool, int, float or str, also where None or a value for each task is allowed."""
    hint = _HINTS[name]
    return next(kind for kind in _TYPE_NAMES if kind is hint or kind in typing.get_args(hint))


def convert(name: str, value: Any, source: str) -> Any:
    """Convert a value from the command line or a YAML file to the option's type, and check its range."""
    if isinstance(value, dict) and name in BY_TASK:
        return {str(task): _convert_one(name, each, f"{source}: {task}") for task, each in value.items()}
    return _convert_one(name, value, source)


def _convert_one(name: str, value: Any, source: str) -> Any:
    field, wanted = FIELDS[name], field_type(name)
    value = _as_text(field, value)
    try:
        if isinstance(value, list | dict) or isinstance(value, bool) != (wanted is bool):
            raise ValueError
        converted = value if wanted is bool else wanted(str(value))
    except ValueError:
        raise UserError(f"{source} must be {_TYPE_NAMES[wanted]}, got {described(value)}") from None
    check_value(field, converted, source)
    return converted


def _as_text(field: dataclasses.Field, value: Any) -> Any:
    """Lists and mappings as the command line spells them, where the option has a list or pairs; a word for a switch."""
    metadata = field.metadata
    if isinstance(value, list) and (metadata["several"] or metadata["metavar"] == LIST):
        return ",".join(map(str, value))
    if isinstance(value, dict) and metadata["metavar"] == PAIRS:
        return ",".join(f"{key}={each if isinstance(each, str) else json.dumps(each)}" for key, each in value.items())
    if isinstance(value, str) and field_type(field.name) is bool:
        return SWITCH.get(value.strip().lower(), value)
    return value
