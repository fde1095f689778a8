"""Files with options: what --config reads, and what a run has recorded as config.json."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mr1fast.checks import nearest
from mr1fast.errors import UserError
from mr1fast.options.keyed import KEYED, with_long_names
from mr1fast.options.values import FIELDS, convert

# The first entry of config.json and --print-config; a change after which an old file would be misread raises it.
SCHEMA_VERSION = 1
# Entries of config.json that are no options.
RECORDS = ("schema_version", "max_steps_changes")
MOST_NODES = 100_000  # a file of a few lines may stand for more than any memory holds, see `_written_out`
LONGEST_NUMBER = 1000  # characters; Python itself does not spell out numbers of more than 4,300 digits


def read_yaml(path: str) -> dict[str, Any]:
    """The options of a YAML (or JSON) file, spelt with - or _; null leaves one at its default."""
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        content = safely_loaded(text, lambda node: _check_keys(path, node))
    except UserError:
        raise
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
    given, unknown = read_options(content, path)
    if unknown and not is_newer(content):
        known = nearest(unknown[0].replace("-", "_"), [*FIELDS, *KEYED])
        raise UserError(f"{path}: unknown option {unknown[0]!r}{known}")
    say_unknown(path, unknown)
    return given


def safely_loaded(text: str, check: Callable[[Any], None] = lambda node: None) -> Any:
    """What a YAML text stands for. check: of its node, before what is merged into a mapping is in it.

    Raises yaml.YAMLError, ValueError and RecursionError.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """That takes whole numbers of any length for a mistake of the file."""

    Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)
    loader = Loader(text)
    node = loader.get_single_node()
    if _written_out(node, {}) > MOST_NODES:
        raise yaml.YAMLError("its aliases refer to themselves, or to one another too often")
    check(node)
    try:
        return None if node is None else loader.construct_document(node)
    except (LookupError, AttributeError) as error:  # of PyYAML itself, for "!!int ''" and "!!timestamp x"
        raise yaml.YAMLError("a tag does not fit its value") from error


def _whole_number(loader: Any, node: Any) -> int:
    if len(node.value) > LONGEST_NUMBER:
        raise ValueError(f"a number of {len(node.value):,} digits is too long")
    return loader.construct_yaml_int(node)


def _written_out(node: Any, known: dict[int, float]) -> float:
    """How many nodes there would be without aliases; infinitely many where one refers to itself."""
    if id(node) not in known:
        known[id(node)] = math.inf  # if it is met again in itself
        value = getattr(node, "value", None)  # a list of nodes, one of pairs of nodes, or a text
        parts = [each if isinstance(each, tuple) else (each,) for each in value] if isinstance(value, list) else []
        known[id(node)] = 1 + sum(_written_out(part, known) for pair in parts for part in pair)
    return known[id(node)]


def read_options(content: Mapping[Any, Any], path: str) -> tuple[dict[str, Any], list[str]]:
    """The options that a file sets, by name, and the keys in it that are not options."""
    given: dict[str, Any] = {}
    unknown: list[str] = []
    for key, value in content.items():
        entry = str(key).replace("-", "_")
        for name, each in with_long_names(entry, value, f"{path}: {key}").items():
            said = name if entry in KEYED else str(key)
            if name not in FIELDS:
                unknown += [] if name in RECORDS else [said]
            elif each is not None:
                given[name] = convert(name, each, f"{path}: {said}")
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


def _check_keys(path: str, node: Any) -> None:
    """Refuse an option that is set twice; YAML's loader would silently take the last value."""
    lines: dict[str, int] = {}
    if getattr(node, "id", "") != "mapping":  # which is said elsewhere
        return
    for name, line in _lines(node, path):
        if name in lines:
            raise UserError(f"{path}: option {name!r} is set in line {lines[name]} and again in line {line}")
        lines[name] = line


def _lines(node: Any, path: str) -> Iterator[tuple[str, int]]:
    """The options that a file sets, under their long names, and where."""
    for key, value in node.value:
        entry = str(key.value).replace("-", "_")
        if entry in KEYED and value.id == "mapping":
            settings: list[tuple[Any, Any]] = [(each, {each.value: None}) for each, _ in value.value]
        else:
            settings = [(key, value.value if value.tag.endswith(":str") else None)]
        for where, setting in settings:
            for name in with_long_names(entry, setting, f"{path}: {key.value}"):
                yield name, where.start_mark.line + 1
