"""How the trainer's options are given: the command line beats the YAML file, which beats the defaults.

Nothing here imports torch, so that a mistake is answered at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mr1fast.checks import nearest
from mr1fast.errors import UserError
from mr1fast.options.config import TrainConfig, check_value, flag
from mr1fast.options.program import Parser, prog

FIELDS = {option_field.name: option_field for option_field in dataclasses.fields(TrainConfig)}
_HINTS = typing.get_type_hints(TrainConfig)
_TYPE_NAMES = {int: "a whole number", float: "a number", str: "text"}


def field_type(name: str) -> type:
    """int, float or str, also where None is allowed."""
    hint = _HINTS[name]
    return next(iter(set(typing.get_args(hint)) - {type(None)}), hint)


def convert(name: str, value: Any, source: str) -> Any:
    """A value of the command line or of a YAML file in the option's type and range; both come through here as text."""
    wanted = field_type(name)
    try:
        if isinstance(value, bool | list | dict):
            raise ValueError
        converted = wanted(str(value))
    except ValueError:
        raise UserError(f"{source} must be {_TYPE_NAMES[wanted]}, got {value!r}") from None
    check_value(FIELDS[name], converted, source)
    return converted


def build_parser() -> Parser:
    parser = Parser(
        prog=prog("train"),
        description="Train a Qwen2-VL with GRPO-D on images with questions whose answers can be verified.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE", help="a YAML file with any of these options; flags override it")
    parser.add_argument(
        "--resume",
        metavar="DIR",
        nargs="?",
        const="",
        help="go on from a run or a checkpoint; without DIR from the newest checkpoint under --output-dir, or runs",
    )
    for name, option_field in FIELDS.items():
        metadata = option_field.metadata
        default = metadata["shown"] or option_field.default
        unit = f", in {metadata['unit']}" if metadata["unit"] else ""
        choices = f" ({', '.join(metadata['choices'])})" if metadata["choices"] else ""
        parser.add_argument(
            flag(name),
            metavar={int: "N", float: "X", str: "TEXT"}[field_type(name)],
            help=f"{metadata['help']}{choices}{unit} [default: {default}]".replace("%", "%%"),
        )
    return parser


@dataclass(frozen=True)
class Request:
    """What the user asked for: the configuration, which options were set, and what to resume."""

    config: TrainConfig
    given: dict[str, Any]  # the options that the command line or the YAML file set
    resume: str | None  # None: a new run; "": the newest checkpoint; else a run or a checkpoint


def parse_arguments(arguments: Sequence[str]) -> Request:
    """The command line, and the YAML file it may name. Raises UserError; --help prints and exits as argparse does."""
    flags = vars(build_parser().parse(arguments))
    resume, config_file = flags.pop("resume", None), flags.pop("config", None)
    given = {} if config_file is None else read_yaml(config_file)
    given |= {name: convert(name, value, flag(name)) for name, value in flags.items()}
    return Request(TrainConfig(**given), given, resume)


def read_yaml(path: str) -> dict[str, Any]:
    """The options of a YAML (or JSON) file, spelt with - or _; null leaves one at its default."""
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        node, content = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"--config {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"--config {path} is not a text file in UTF-8") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark is not None else ""
        reason = getattr(error, "problem", None) or getattr(error, "reason", error)
        raise UserError(f"--config {path} is not valid YAML{where}: {reason}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"--config {path} must hold lines of the form 'option: value'")
    _check_keys(path, node)
    given = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in FIELDS:
            raise UserError(f"{path}: unknown option {str(key)!r}{nearest(name, FIELDS)}")
        if value is not None:
            given[name] = convert(name, value, f"{path}: {key}")
    return given


def _check_keys(path: str, node: Any) -> None:
    """An option that is there twice, which YAML's loader takes for its last value."""
    lines: dict[str, int] = {}
    for key, _ in node.value:
        name, line = str(key.value).replace("-", "_"), key.start_mark.line + 1
        if name in lines:
            raise UserError(f"{path}: option {name!r} is in line {lines[name]} and again in line {line}")
        lines[name] = line
