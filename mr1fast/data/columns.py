"""Which column of local data is what: the usual names, and those that the user gives."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mr1fast.checks import nearest, not_one_of, pairs
from mr1fast.errors import UserError

# What a row has -> the columns that may hold it; the first that is not empty counts. `file_name` is that of image
# folders.
USUAL_NAMES = {
    "image": ("image", "images", "image_path", "file_name"),
    "problem": ("problem", "question", "query", "prompt"),
    "solution": ("solution", "answer", "ground_truth"),
    "choices": ("choices",),
}
# Question and answer as turns of a chat, as ShareGPT and as OpenAI write them.
CHATS = ("conversations", "messages")
EXAMPLE = "problem=question,solution=ground_truth,image=image_path"


@dataclass(frozen=True)
class Reading:
    """How the rows of local data are read.

    columns: "image", "problem", "solution" or "choices" -> the column that the user names for it. image_root: where
    relative image paths start, None for the folder of the file that names them. strict: whether a column that the user
    names must be there, or may have its usual name as well. allow_outside: whether the paths of images may lead out of
    image_root and the folder of the data.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    image_root: Path | None = None
    strict: bool = True
    allow_outside: bool = False

    def names(self, what: str) -> tuple[str, ...]:
        """The columns that may hold the image, the problem, the solution or the choices."""
        if what not in self.columns:
            return USUAL_NAMES[what]
        return (self.columns[what],) if self.strict else (self.columns[what], *USUAL_NAMES[what])

    @property
    def chats(self) -> tuple[str, ...]:
        """The columns that may hold question and answer as a chat; none where the user says which has the question."""
        return () if self.strict and "problem" in self.columns else CHATS

    def cell(self, row: Mapping[str, Any], what: str) -> Any:
        """What the row has; None if it has nothing."""
        return first_filled(row, self.names(what))

    @property
    def all_names(self) -> frozenset[str]:
        """The columns that are looked at; all others are for reward functions."""
        return frozenset(CHATS).union(*(self.names(what) for what in USUAL_NAMES))

    def described(self, columns: Collection[str]) -> str:
        """What was taken for what, such as "question as problem"; "" where `columns` have the names that we give."""
        parts = []
        for what in ("problem", "solution", "image"):
            found = [name for name in self.names(what) if name in columns]
            if not found and what != "image":
                found = [name for name in self.chats if name in columns]
            if found not in ([what], ["file_name"], []):
                parts.append(f"{' or else '.join(found)} as {what}")
        return ", ".join(parts)

    def check(self, source: str, columns: Collection[str]) -> None:
        """A column that no row has is one mistake, not a thousand skipped rows. Raises UserError."""
        names = sorted(" ".join(str(name).split()) for name in columns)  # whole lines, where a CSV's quotes are wrong
        there = f"its columns are {', '.join(names)}"
        for what, name in self.columns.items():
            if self.strict and name not in columns:
                hint = nearest(name, columns)
                raise UserError(f"--columns {what}={name}: data {source!r} has no column {name!r}{hint}; {there}")
        for what in ("problem", "solution"):
            if not {*self.names(what), *self.chats} & {*columns}:
                others = ", ".join((*self.names(what)[1:], *self.chats))
                say = f"say which it is with --columns {what}=NAME"
                raise UserError(f"data {source!r} has no column {what!r} (or {others}); {there}; {say}")


def first_filled(row: Mapping[str, Any], names: Collection[str]) -> Any:
    return next((row[name] for name in names if not is_empty(row.get(name))), None)


def is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | bytes | list | tuple) and not value)


def parse_columns(text: str, source: str) -> dict[str, str]:
    """`EXAMPLE` as a dictionary. Raises UserError, which calls the text `source`."""
    columns = pairs(text, source, EXAMPLE)
    for what in columns:
        if what not in USUAL_NAMES:
            raise UserError(not_one_of(f"{source}: what stands before the =", what, USUAL_NAMES))
    return columns
