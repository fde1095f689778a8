"""Imports point down only, lazy ones and those for type checkers included."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOUNDATION = {"errors", "checks"}
# What each room may import besides itself. Programs, the other files of mr1fast/, may import everything.
ALLOWED: dict[str, set[str]] = {"errors": set(), "checks": {"errors"}, "kernels": set()}
ALLOWED["losses"] = {"kernels", *FOUNDATION}
ALLOWED["rewards"] = {*FOUNDATION}
ALLOWED["data"] = {"losses", "rewards", *FOUNDATION}
ALLOWED["options"] = {"data", *ALLOWED["data"]}  # which tasks there are to choose from
ALLOWED["model"] = {"options", *ALLOWED["options"]}
ALLOWED["evaluation"] = {"model", *ALLOWED["model"]}
ALLOWED["training"] = {"evaluation", *ALLOWED["evaluation"]}  # it evaluates on the way
ALLOWED["reproduction"] = {"training", *ALLOWED["training"]}
ALLOWED["integrations"] = {"kernels", "training", *ALLOWED["training"]}  # other engines take a run of ours
ALLOWED["__init__"] = {"losses"}
FILES = sorted(path for folder in ("mr1fast", "kernels") for path in (ROOT / folder).rglob("*.py"))


def place_of(path):
    """The room that a file belongs to, or the program that it is."""
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    return folder if folder == "kernels" else rest[0]


def imported(path):
    """(line, room or program) of each import from mr1fast in the file; its public names come out of `losses`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for package, *rest in (name.split(".") for name in names):
            if package == "mr1fast" and rest:
                place = ROOT / "mr1fast" / rest[0]
                yield node.lineno, rest[0] if place.exists() or place.with_suffix(".py").exists() else "losses"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    place = place_of(path)
    if place in ALLOWED:
        wrong = [f"{to} (line {line})" for line, to in imported(path) if to not in ALLOWED[place] | {place}]
        assert not wrong, f"{path.relative_to(ROOT)} must not import {', '.join(wrong)}"


def test_every_room_has_its_place():
    rooms = {init.parent.name for init in (ROOT / "mr1fast").glob("*/__init__.py")}
    assert rooms | {"kernels", "__init__", *FOUNDATION} == set(ALLOWED)
