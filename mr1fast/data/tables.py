"""Local data as tables: the files of a folder, their content, and the split that each is named after."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mr1fast.data.arrow_files import ArrowRows, Unreadable, read_parquet, read_saved
from mr1fast.data.text_files import Row, read_csv, read_json, read_json_lines, whole_characters
from mr1fast.errors import UserError

COLUMNS = ("image", "problem", "solution")
# What is looked at; `file_name` is what an image folder calls `image`. Other columns are for reward functions.
READ = (*COLUMNS, "file_name", "choices")

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff")
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
# What `datasets` and the hub write beside the data.
_NOT_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


@dataclass(frozen=True)
class Table:
    """What one file holds."""

    rows: Sequence[Row]
    file: Path  # relative image paths start at its folder
    name: str  # unique among the tables of a source
    split: str | None = None  # the split after which it, or a folder above it, is named
    unreadable: str = ""  # why the file as a whole could not be read
    note: str = ""  # what had to be done to read it

    @property
    def folder(self) -> Path:
        return self.file if self.file.is_dir() else self.file.parent

    @cached_property
    def columns(self) -> frozenset[str]:
        if isinstance(self.rows, ArrowRows):
            return self.rows.columns
        return frozenset().union(*(row for row in self.rows if isinstance(row, dict)))


def read_tables(source: Path) -> list[Table]:
    """Every table under a folder, or the one in a file, in a fixed order. Raises UserError where there is none."""
    if not source.exists():
        raise UserError(f"data {str(source)!r} does not exist")
    own = _split_of_source(source)
    if source.is_file():
        if source.suffix.lower() not in SUFFIXES:
            raise UserError(f"data {str(source)!r} is not a {_choices()} file")
        return [_table(source, whole_characters(source.name), own)]
    if (source / "state.json").exists() or (source / "dataset_dict.json").exists():
        return _saved_tables(source, own)
    files = [file for file in sorted(source.rglob("*")) if _is_table(file, source)]
    if not files:
        if any(file.suffix.lower() in _IMAGE_SUFFIXES for file in source.rglob("*")):
            raise UserError(f"data folder {str(source)!r} has images, but no metadata.jsonl or metadata.csv about them")
        raise UserError(f"data folder {str(source)!r} has no {_choices()} file")
    names = [file.relative_to(source) for file in files]
    return [_table(file, whole_characters(str(name)), _split_of(name) or own) for file, name in zip(files, names)]


def check_columns(source: Path, tables: Sequence[Table]) -> None:
    """A column that no row has is one mistake, not a thousand skipped rows. Raises UserError."""
    columns = {column for table in tables for column in table.columns}
    if not columns:
        return  # reported with the reasons, as no readable row
    known = columns | ({"image"} if "file_name" in columns else set())
    for column in COLUMNS:
        if column not in known:
            names = ", ".join(sorted(map(str, columns)))
            raise UserError(f"data {str(source)!r} has no column {column!r}; its columns are {names}")


def _choices() -> str:
    return f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"


def _is_table(file: Path, source: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(source).parts)
    return not hidden and file.suffix.lower() in SUFFIXES and file.name not in _NOT_DATA and file.is_file()


def _table(file: Path, name: str, split: str | None) -> Table:
    suffix, encoding = file.suffix.lower(), ""
    rows: Sequence[Row]
    try:
        if suffix == ".parquet":
            rows = read_parquet(file, READ)
        elif suffix == ".csv":
            rows, encoding = read_csv(file.read_bytes(), READ)
        else:
            rows = (read_json if suffix == ".json" else read_json_lines)(file.read_bytes())
    except Unreadable as error:
        return Table([], file, name, split, unreadable=f"{name} {error}")
    except OSError as error:
        raise UserError(f"data file {str(file)!r} cannot be read: {error.strerror or error}") from None
    return Table(rows, file, name, split, note=f"{name} is not UTF-8, read as {encoding}" if encoding else "")


def _saved_tables(source: Path, own: str | None) -> list[Table]:
    try:
        saved = read_saved(source)
    except Unreadable as error:
        raise UserError(f"data folder {str(source)!r} {error}") from None
    return [Table(rows, source, name or source.name, _split_of(Path(name)) or own) for name, rows in saved.items()]


# ---- what a name says -----------------------------------------------------------------------------------------------


def _split_of(file: Path) -> str | None:
    """The split that a path names: `train-00000-of-00002.parquet`, `test/metadata.csv`; the innermost word decides."""
    for part in reversed((*file.parent.parts, file.stem)):
        words = re.split(r"[^a-z]+", part.lower())
        for split, spellings in _SPLIT_WORDS.items():
            if any(spelling in words for spelling in spellings):
                return split
    return None


def _split_of_source(source: Path) -> str | None:
    """The split that a single file is named after, or the folder that is the source or holds the source's metadata.

    For a folder, one word in its name is not enough, since it may be the name of a whole project.
    """
    path = Path(os.path.abspath(source))
    if source.is_file() and path.stem != "metadata":
        return _split_of(Path(path.name))
    folder = path.parent if source.is_file() else path
    return next((split for split, words in _SPLIT_WORDS.items() if folder.name.lower() in words), None)
