"""How the trainer's options are given: the command line beats the YAML file, which beats the defaults.

Nothing here imports torch, so that a mistake is reported at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mr1fast.checks import described, nearest
from mr1fast.errors import UserError
from mr1fast.options.config import TrainConfig
from mr1fast.options.fields import check_value, option_string
from mr1fast.options.pairs import written_pairs
from mr1fast.options.preset import PRESETS, beneath, preset_file
from mr1fast.options.program import Parser, at_least, prog
from mr1fast.options.recipes import SMALL_MODEL
from mr1fast.options.reward_weights import DEFAULT_REWARDS, add_rewards
from mr1fast.options.train_options import BY_TASK, GROUPS

FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}
_HINTS = typing.get_type_hints(TrainConfig)
_TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
# The first entry of config.json and --print-config; a change after which an old file would be misread raises it.
SCHEMA_VERSION = 1
# Entries of config.json that are no options.
RECORDS = ("schema_version", "max_steps_changes")
THIS_DEVICE = 0  # what --plan is without a number
# Options that cannot be given with one.
EXCLUDE = {"epochs": ("max_steps",), "max_steps": ("epochs",)}


def field_type(name: str) -> type:
    """bool, int, float or str, also where None or a value for each task is allowed."""
    hint = _HINTS[name]
    return next(kind for kind in _TYPE_NAMES if kind is hint or kind in typing.get_args(hint))


def convert(name: str, value: Any, source: str) -> Any:
    """Convert a value from the command line or a YAML file to the option's type, and check its range."""
    if isinstance(value, dict) and name in BY_TASK:
        return {str(task): convert(name, each, f"{source}: {task}") for task, each in value.items()}
    if isinstance(value, dict) and FIELDS[name].metadata["pairs"]:
        value = written_pairs(value)
    if isinstance(value, list) and FIELDS[name].metadata["several"]:
        value = ",".join(map(str, value))
    wanted = field_type(name)
    if wanted is bool and isinstance(value, bool):
        return value
    try:
        if wanted is bool or isinstance(value, bool | list | dict):
            raise ValueError
        converted = wanted(str(value))
    except ValueError:
        raise UserError(f"{source} must be {_TYPE_NAMES[wanted]}, got {described(value)}") from None
    check_value(FIELDS[name], converted, source)
    return converted


class _Once(argparse.Action):
    """Refuses an option that is given twice; argparse would silently take the second value."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        if hasattr(namespace, self.dest):
            parser.error(f"{option_string} is given twice")
        setattr(namespace, self.dest, values)


class _Several(argparse.Action):
    """Makes one list, separated by commas, of an option that is given several times."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        before = getattr(namespace, self.dest, None)
        setattr(namespace, self.dest, values if before is None else f"{before},{values}")


def build_parser() -> Parser:
    parser = Parser(
        prog=prog("train"),
        description="Train a Qwen2-VL or Qwen2.5-VL with GRPO-D on questions about images whose answers can be "
        "verified.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        epilog="Small models are the embedded one and any model in a folder that has fewer than "
        f"{SMALL_MODEL:,} parameters, such as one trained from it. All others use the settings of R1-V.",
    )
    run = parser.add_argument_group("the run")
    run.add_argument(
        "--config",
        action=_Once,
        metavar="FILE",
        help="YAML file that sets any of the options below; the command line takes precedence",
    )
    run.add_argument(
        "--preset",
        action=_Once,
        metavar="NAME",
        help="options of an experiment of the paper, over which --config and the command line take precedence: "
        f"{', '.join(PRESETS)}; vc is visual counting, gr geometry reasoning, 2b and 7b the size of Qwen2-VL",
    )
    run.add_argument(
        "--print-config",
        action="store_true",
        help="print such a file with the value that every option would have, defaults included, and exit",
    )
    run.add_argument(
        "--plan",
        action=_Once,
        metavar="GB",
        nargs="?",
        const=THIS_DEVICE,
        type=at_least(1),
        help="say what a step will hold in memory and whether that fits this device, or a GPU with so many GB; if not, "
        "say which options make it fit, and exit with 1. No weights are read",
    )
    run.add_argument(
        "--resume",
        action=_Once,
        metavar="DIR",
        nargs="?",
        const="",
        help="continue the run DIR from its last checkpoint, or from DIR itself if that is a checkpoint; without DIR, "
        "continue the run with the newest checkpoint under --output-dir, or else under runs",
    )
    groups = {key: parser.add_argument_group(title) for key, title in GROUPS.items()}
    groups["reward"].add_argument(
        "--reward",
        action="append",
        metavar="NAME",
        help="one more reward, with the weight 1; may be given several times. --reward mymodule:myfunction is short "
        f"for --reward-weights {DEFAULT_REWARDS},mymodule:myfunction=1",
    )
    for name, field in FIELDS.items():
        add_option(groups[field.metadata["group"]], name)
    return parser


def add_option(group: argparse._ArgumentGroup, name: str, **keywords: Any) -> None:
    """Add an option as it is declared; its value is text, for `convert`. keywords: more of add_argument's."""
    field, kind = FIELDS[name], field_type(name)
    metavar = field.metadata["metavar"] or {int: "N", float: "X", str: "NAME"}.get(kind)
    value: dict[str, Any] = {"action": "store_true"} if kind is bool else {"metavar": metavar}
    if field.metadata["several"]:
        value["action"] = _Several
    group.add_argument(option_string(name), help=_help(field).replace("%", "%%"), **value, **keywords)


def _help(field: dataclasses.Field) -> str:
    metadata = field.metadata
    unit = f", in {metadata['unit']}" if metadata["unit"] else ""
    choices = f" ({', '.join(metadata['choices'])})" if metadata["choices"] else ""
    what, semicolon, more = metadata["help"].partition(";")
    return f"{what}{unit}{semicolon}{more}{choices} [default: {metadata['shown'] or field.default}]"


@dataclass(frozen=True)
class Request:
    """What the user asked for."""

    given: dict[str, Any]  # the options that the command line or the YAML file set
    config: TrainConfig | None  # of a new run; a resumed one has its own
    resume: str | None = None  # None: a new run; "": the newest checkpoint; else a run or a checkpoint
    print_config: bool = False
    plan: int | None = None  # gigabytes of a GPU, or THIS_DEVICE


def parse_arguments(arguments: Sequence[str]) -> Request:
    """The command line, and the YAML file it may name. Raises UserError; --help prints and exits as argparse does."""
    flags = vars(build_parser().parse(arguments))
    resume, config_file, preset, plan = (flags.pop(name, None) for name in ("resume", "config", "preset", "plan"))
    print_config, rewards = flags.pop("print_config", False), flags.pop("reward", [])
    given = {} if config_file is None else read_yaml(config_file)
    given = layered(given, {name: convert(name, value, option_string(name)) for name, value in flags.items()})
    if preset is not None:
        if resume is not None:
            raise UserError("--preset is for a new run, and --resume continues one with its own options")
        given = layered(beneath(read_yaml(str(preset_file(preset))), given), given)
    if rewards:
        given["reward_weights"] = add_rewards(given.get("reward_weights", DEFAULT_REWARDS), rewards)
    return Request(given, TrainConfig(**given) if resume is None else None, resume, print_config, plan)


def layered(lower: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    """The options of both, where those of `upper` take precedence, also over what they exclude."""
    excluded = {other for name in upper for other in EXCLUDE.get(name, ())}
    return {name: value for name, value in lower.items() if name not in excluded} | upper


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
    except RecursionError:
        raise UserError(f"--config {path} is not valid YAML: it is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark is not None else ""
        reason = getattr(error, "problem", None) or getattr(error, "reason", error)
        raise UserError(f"--config {path} is not valid YAML{where}: {reason}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"--config {path} must hold lines of the form 'option: value'")
    _check_keys(path, node)
    given, unknown = read_options(content, path)
    if unknown and not is_newer(content):
        raise UserError(f"{path}: unknown option {unknown[0]!r}{nearest(unknown[0].replace('-', '_'), FIELDS)}")
    say_unknown(path, unknown)
    return given


def read_options(content: Mapping[Any, Any], path: str) -> tuple[dict[str, Any], list[str]]:
    """The options that a file sets, by name, and the keys in it that are not options."""
    given, unknown = {}, []
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in FIELDS:
            unknown += [] if name in RECORDS else [str(key)]
        elif value is not None:
            given[name] = convert(name, value, f"{path}: {key}")
    return given, unknown


def is_newer(content: Mapping[Any, Any]) -> bool:
    """Whether a newer version of mr1fast, which may have more options, wrote this."""
    version = content.get("schema_version")
    return isinstance(version, int) and version > SCHEMA_VERSION


def say_unknown(path: str, unknown: Sequence[str]) -> None:
    if unknown:
        print(
            f"note: {path} has options that this version does not know and ignores: {', '.join(unknown)}",
            file=sys.stderr,
        )


def printed_config(config: TrainConfig) -> str:
    """The resolved options as YAML, which --config reads."""
    import yaml

    lines = [f"# {name}: {defaults}\n" for name in config.names if (defaults := config.defaults_from(name))]
    for name, value in {"schema_version": SCHEMA_VERSION, **config.resolved()}.items():
        flow = None if isinstance(value, dict) else False
        lines.append(yaml.safe_dump({name: value}, default_flow_style=flow, sort_keys=False))
    return "".join(lines)


def _check_keys(path: str, node: Any) -> None:
    """Refuse an option that is set twice; YAML's loader would silently take the last value."""
    lines: dict[str, int] = {}
    for key, _ in node.value:
        name, line = str(key.value).replace("-", "_"), key.start_mark.line + 1
        if name in lines:
            raise UserError(f"{path}: option {name!r} is set in line {lines[name]} and again in line {line}")
        lines[name] = line
