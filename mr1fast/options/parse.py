"""How the trainer's options are given: the command line beats the YAML file, which beats the defaults.

Nothing here imports torch, so that a mistake is reported at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mr1fast.errors import UserError
from mr1fast.options.config import TrainConfig
from mr1fast.options.config_file import SCHEMA_VERSION, read_yaml
from mr1fast.options.fields import PAIRS, option_string
from mr1fast.options.keyed import KEYED, KEYS, option_strings, read_keys
from mr1fast.options.preset import PRESETS, beneath, preset_file
from mr1fast.options.program import Parser, at_least, prog
from mr1fast.options.recipes import SMALL_MODEL
from mr1fast.options.reward_weights import DEFAULT_REWARDS, add_rewards
from mr1fast.options.train_options import GROUPS
from mr1fast.options.values import FIELDS, convert, field_type

THIS_DEVICE = 0  # what --plan is without a number
# Options that cannot be given with one.
EXCLUDE = {"epochs": ("max_steps",), "max_steps": ("epochs",)}


class _Once(argparse.Action):
    """Refuses an option that is given twice; argparse would silently take the second value."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        if hasattr(namespace, self.dest):
            parser.error(f"{option_string} is given twice")
        setattr(namespace, self.dest, values)


class _Keys(argparse.Action):
    """Sets the options that the keys of an option are short for."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        for name, value in read_keys(self.dest, values, str(option_string)).items():
            setattr(namespace, name, value)


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
        epilog=f"Each key of {', '.join(map(option_string, KEYED))} is also an option of its own: --eval "
        "steps=50,samples=400 is --eval-steps 50 --eval-samples 400. A switch is turned off by --no-NAME, and a key "
        "that is one by NAME=no. Small models are the embedded one and any model in a folder that has fewer than "
        f"{SMALL_MODEL:,} parameters, such as one trained from it. All others use the settings of R1-V.",
    )
    _add_run(parser.add_argument_group("the run"))
    groups = {key: parser.add_argument_group(title) for key, title in GROUPS.items()}
    groups["reward"].add_argument(
        "--reward",
        action="append",
        metavar="NAME",
        help="one more reward, with the weight 1; may be given several times. --reward mymodule:myfunction is short "
        f"for --reward-weights {DEFAULT_REWARDS},mymodule:myfunction=1",
    )
    listed = set[str]()
    for name, field in FIELDS.items():
        group, option = groups[field.metadata["group"]], field.metadata["key_of"]
        if option and option not in listed:
            group.add_argument(option_string(option), action=_Keys, metavar=PAIRS, help=_help_of_keys(option))
            listed.add(option)
        add_option(group, name, **({"help": argparse.SUPPRESS} if option else {}))
    return parser


def _add_run(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--config",
        action=_Once,
        metavar="FILE",
        help="YAML file that sets any of the options below; the command line takes precedence",
    )
    add(
        "--preset",
        action=_Once,
        metavar="NAME",
        help="options of an experiment of the paper, over which --config and the command line take precedence: "
        f"{', '.join(PRESETS)}; vc is visual counting, gr geometry reasoning, 2b and 7b the size of Qwen2-VL",
    )
    add(
        "--print-config",
        action="store_true",
        help="print such a file with the value that every option would have, defaults included, and exit",
    )
    add(
        "--plan",
        action=_Once,
        metavar="GB",
        nargs="?",
        const=THIS_DEVICE,
        type=at_least(1),
        help="say what a step will hold in memory and whether that fits this device, or a GPU with so many GB; if not, "
        "say which options make it fit, and exit with 1. No weights are read",
    )
    add(
        "--resume",
        action=_Once,
        metavar="DIR",
        nargs="?",
        const="",
        help="continue the run DIR from its last checkpoint, or from DIR itself if that is a checkpoint; without DIR, "
        "continue the run with the newest checkpoint under --output-dir, or else under runs",
    )


def _add_switch(group: argparse._ArgumentGroup, name: str, keywords: dict[str, Any]) -> None:
    """--NAME and --no-NAME. --help shows the one that changes the default."""
    yes = option_strings(name)
    forms = [("store_true", yes), ("store_false", [f"--no-{string.removeprefix('--')}" for string in yes])]
    for is_usual, (action, strings) in zip((FIELDS[name].default, not FIELDS[name].default), forms):
        group.add_argument(
            *strings, action=action, dest=name, **(keywords | ({"help": argparse.SUPPRESS} if is_usual else {}))
        )


def add_option(group: argparse._ArgumentGroup, name: str, **keywords: Any) -> None:
    """Add an option as it is declared; its value is text, for `convert`. keywords: more of add_argument's."""
    field = FIELDS[name]
    if field_type(name) is bool:
        _add_switch(group, name, {"help": _help(name), **keywords})
        return
    value: dict[str, Any] = {}
    if metavar := _metavar(name):
        value["metavar"] = metavar
    if field.metadata["several"]:
        value["action"] = _Several
    group.add_argument(*option_strings(name), dest=name, **{"help": _help(name), **value, **keywords})


def _metavar(name: str) -> str:
    """How a value is called in --help; "" for a switch."""
    return FIELDS[name].metadata["metavar"] or {int: "N", float: "X", str: "NAME", bool: ""}[field_type(name)]


def _help(name: str) -> str:
    field = FIELDS[name]
    metadata = field.metadata
    unit = f", in {metadata['unit']}" if metadata["unit"] else ""
    choices = f" ({', '.join(metadata['choices'])})" if metadata["choices"] else ""
    what, semicolon, more = metadata["help"].partition(";")
    default: Any = field.default
    if isinstance(default, bool):
        default = "yes" if default else "no"
    return f"{what}{unit}{semicolon}{more}{choices} [default: {metadata['shown'] or default}]".replace("%", "%%")


def _help_of_keys(option: str) -> str:
    """What the option does, and a line for each of its keys."""
    keys = [f"{key}={_metavar(name) or 'yes'}: {_help(name)}" for key, name in KEYS[option].items()]
    return "\n".join([f"{KEYED[option].help}, such as {KEYED[option].example}", *keys])


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


def printed_config(config: TrainConfig) -> str:
    """The resolved options as YAML, which --config reads."""
    import yaml

    lines = [f"# {name}: {defaults}\n" for name in config.names if (defaults := config.defaults_from(name))]
    for name, value in {"schema_version": SCHEMA_VERSION, **config.resolved()}.items():
        flow = None if isinstance(value, dict) else False
        lines.append(yaml.safe_dump({name: value}, default_flow_style=flow, sort_keys=False))
    return "".join(lines)
