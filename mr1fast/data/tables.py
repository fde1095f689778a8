"""Local data as tables: the files of a folder, their content, and the split that each is named after."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mr1fast.data.arrow_files import ArrowRows, Unreadable, hub_folders, read_hub, read_parquet, read_saved
from mr1fast.data.columns import Reading
from mr1fast.data.sources import is_hub_name
from mr1fast.data.text_files import Row, read_csv, read_json, read_json_lines, whole_characters
from mr1fast.errors import UserError

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
    file: Path
    source: Path  # what the user named: this file, a folder that it is in, or a data set on the hub
    reading: Reading
    name: str  # unique among the tables of a source
    split: str | None = None  # the split after which it, or a folder above it, is named
    unreadable: str = ""  # why the file as a whole could not be read
    note: str = ""  # what had to be done to read it

    @property
    def folder(self) -> Path:
        """Where relative image paths start."""
        if self.reading.image_root is not None:
            return self.reading.image_root
        return self.file if self.file.is_dir() else self.file.parent

    @cached_property
    def roots(self) -> tuple[Path, ...]:
        """The folders that images must be in, unless the user allows all others, free of links."""
        if is_hub_name(str(self.source)):
            return hub_folders()
        data = self.source if self.source.is_dir() else self.source.parent
        return tuple(Path(os.path.realpath(root)) for root in (data, self.reading.image_root) if root is not None)

    @cached_property
    def columns(self) -> frozenset[str]:
        if isinstance(self.rows, ArrowRows):
            return self.rows.columns
        return frozenset().union(*(row for row in self.rows if isinstance(row, dict)))


def read_tables(source: Path, reading: Reading) -> list[Table]:
    """Every table under a folder, the one in a file, or the splits of a data set on the hub, in a fixed order.

    Raises UserError where there is none.
    """
    if is_hub_name(str(source)):
        return [
            Table(rows, source, source, reading, name, _split_of(Path(name)))
            for name, rows in read_hub(str(source)).items()
        ]
    if not source.exists():
        raise UserError(f"data {str(source)!r} does not exist")
    own = _split_of_source(source)
    if source.is_file():
        if source.suffix.lower() not in SUFFIXES:
            raise UserError(f"data {str(source)!r} is not a {_choices()} file")
        return [_table(source, source, reading, whole_characters(source.name), own)]
    if (source / "state.json").exists() or (source / "dataset_dict.json").exists():
        return _saved_tables(source, reading, own)
    files = [file for file in sorted(source.rglob("*")) if _is_table(file, source)]
    if not files:
        if any(file.suffix.lower() in _IMAGE_SUFFIXES for file in source.rglob("*")):
            raise UserError(f"data folder {str(source)!r} has images, but no metadata.jsonl or metadata.csv about them")
        raise UserError(f"data folder {str(source)!r} has no {_choices()} file")
    names = [file.relative_to(source) for file in files]
    return [
        _table(file, source, reading, whole_characters(str(name)), _split_of(name) or own)
        for file, name in zip(files, names)
    ]


def columns_of(tables: Iterable[Table]) -> set[str]:
    return {column for table in tables for column in table.columns}


def check_columns(source: Path, tables: Sequence[Table]) -> None:
    """Raises UserError unless there are columns for all that a problem needs."""
    columns = columns_of(tables)
    if not columns:
        return  # reported with the reasons, as no readable row
    reading = tables[0].reading
    reading.check(str(source), columns)
    if not columns & {*reading.names("image"), *reading.chats}:
        for table in tables:
            if column := _column_of_images(table):
                what = f"has no column 'image', but {column!r} seems to hold images"
                raise UserError(f"data {str(source)!r} {what}: say so with --columns image={column}, or leave it out")


def _column_of_images(table: Table) -> str:
    """The column that looks as if it held images; "" if there is none."""
    row = next((row for row in table.rows if isinstance(row, dict)), {})
    unread = b"" if isinstance(table.rows, ArrowRows) else None  # bytes, for which nobody asked
    return next((name for name in sorted(table.columns) if _is_image(row.get(name, unread))), "")


def _is_image(value: Any) -> bool:
    if isinstance(value, str):
        return value.lower().endswith(_IMAGE_SUFFIXES)
    return isinstance(value, bytes) or (isinstance(value, dict) and {"bytes", "path"} <= {*value})


def _choices() -> str:
    return f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"


def _is_table(file: Path, source: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(source).parts)
    return not hidden and file.suffix.lower() in SUFFIXES and file.name not in _NOT_DATA and file.is_file()


def _table(file: Path, source: Path, reading: Reading, name: str, split: str | None) -> Table:
    suffix, encoding = file.suffix.lower(), ""
    rows: Sequence[Row]
    try:
        if suffix == ".parquet":
            rows = read_parquet(file, reading.all_names)
        elif suffix == ".csv":
            rows, encoding = read_csv(file.read_bytes(), reading.all_names)
        else:
            rows = (read_json if suffix == ".json" else read_json_lines)(file.read_bytes())
    except Unreadable as error:
        return Table([], file, source, reading, name, split, unreadable=f"{name} {error}")
    except OSError as error:
        raise UserError(f"data file {str(file)!r} cannot be read: {error.strerror or error}") from None
    note = f"{name} is not UTF-8, read as {encoding}" if encoding else ""
    return Table(rows, file, source, reading, name, split, note=note)


def _saved_tables(source: Path, reading: Reading, own: str | None) -> list[Table]:
    try:
        saved = read_saved(source)
    except Unreadable as error:
        raise UserError(f"data folder {str(source)!r} {error}") from None
    return [
        Table(rows, source, source, reading, name or source.name, _split_of(Path(name)) or own)
        for name, rows in saved.items()
    ]


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
