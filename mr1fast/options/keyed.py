"""Options with keys: `--eval steps=50,samples=400` is short for `--eval-steps 50 --eval-samples 400`.

Nothing but parsing knows of them: in `TrainConfig`, in config.json and in --print-config each key has its long name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mr1fast.checks import described, not_one_of
from mr1fast.errors import UserError
from mr1fast.options.fields import LIST, option_string
from mr1fast.options.values import FIELDS, field_type


@dataclass(frozen=True)
class Keyed:
    """An option with keys, which are the fields of TrainOptions that name it as their `key_of`."""

    help: str
    example: str


KEYED = {
    "lora": Keyed(
        "train a LoRA adapter, and none of the model's own weights", "rank=16,alpha=32,targets=q_proj,v_proj"
    ),
    "kl": Keyed("how the KL weight changes during training", "schedule=adaptive,target_kl=0.1"),
    "eval": Keyed("how the model is tested before and after training, and validated during it", "steps=20,samples=100"),
    "save": Keyed("when and how checkpoints are written", "steps=20,total_limit=5"),
}


def key_of(name: str) -> str:
    """The key that stands for a field: rank for lora_rank."""
    return name.removeprefix(FIELDS[name].metadata["key_of"] + "_")


def spellings(name: str) -> list[str]:
    """A field's own name and, for a key, that of the option with its key: merge and lora_merge."""
    option = FIELDS[name].metadata["key_of"]
    return [name] if not option else list(dict.fromkeys([f"{option}_{key_of(name)}", name]))


# Option -> its keys -> their fields.
KEYS = {
    option: {key_of(name): name for name, field in FIELDS.items() if field.metadata["key_of"] == option}
    for option in KEYED
}
LONG_NAMES = {spelling: name for name in FIELDS for spelling in spellings(name)}


def read_keys(option: str, text: str, source: str) -> dict[str, str]:
    """Field -> value of "steps=50,samples=400". Raises UserError, which calls the text `source`.

    What stands between commas without a = belongs to the list before it, or is a switch that is turned on.
    """
    keys, values = KEYS[option], dict[str, str]()
    last = ""
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        key = key.replace("-", "_")
        if not equals and key in keys and field_type(keys[key]) is bool:
            value = "yes"
        elif not equals and last and FIELDS[last].metadata["metavar"] == LIST:
            values[last] += f",{part}"
            continue
        elif not equals:
            raise UserError(f"{source} must be {_form(option)}, got {text!r}")
        if key not in keys:
            raise UserError(not_one_of(f"{source}: a key", key, keys))
        last = keys[key]
        if last in values:
            raise UserError(f"{source} names {key} twice")
        values[last] = value
    return values


def with_long_names(key: str, value: Any, source: str) -> dict[str, Any]:
    """An entry of a YAML file, {key: value}, with an option's keys as the options that they are short for.

    {"lora": {"rank": 16}} and {"lora": "rank=16"} are {"lora_rank": 16}; all other entries stay as they are. A key that
    there is not keeps the name that it would have. Raises UserError, which calls the value `source`.
    """
    if key not in KEYED:
        return {LONG_NAMES.get(key, key): value}
    if isinstance(value, str):
        return {**read_keys(key, value, source)}
    if not isinstance(value, Mapping | None):
        raise UserError(f"{source} must have keys, as {_form(key)}, got {described(value)}")
    long = {f"{key}_{str(each).replace('-', '_')}": entry for each, entry in (value or {}).items()}
    return {LONG_NAMES.get(name, name): entry for name, entry in long.items()}


def _form(option: str) -> str:
    return f"KEY=VALUE, separated by commas, such as {KEYED[option].example}"


def option_strings(name: str) -> list[str]:
    """The spellings of a field on the command line."""
    return [option_string(spelling) for spelling in spellings(name)]
