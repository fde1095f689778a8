"""Examples to train on and to evaluate: the embedded tasks, or local data with the columns image, problem, solution.

Data that is not clean is repaired or left out, counted by reason, and never stops a run: what can be seen from the rows
and the images' headers up front, the rest when an image is decoded.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mr1fast.checks import nearest
from mr1fast.data.example import Example
from mr1fast.data.images import BadImage, check_image, load_image
from mr1fast.data.splits import Place, all_rows, cut_from, image_cell, rows_of_split
from mr1fast.data.tables import ArrowRows, Table, read_tables
from mr1fast.data.tasks import SPLITS, TASKS
from mr1fast.errors import UserError
from mr1fast.rewards import check_solutions, extract_answer

COLUMNS = ("image", "problem", "solution")
ENDLESS = 2**31 - 1  # the length of a split that is drawn on the fly, if no `count` bounds it

# They stand for an image in a prompt. Left in a question, the processor would look for images that are not there.
_IMAGE_MARKERS = re.compile(r"<image>|<video>|<\|(?:image_pad|video_pad|vision_start|vision_end|vision_pad)\|>")
_ANSWER_TAGS = re.compile(r"</?(?:answer|think)>")


class BadRow(ValueError):
    """A row that cannot be used; the message is the reason, short enough to be counted."""


@dataclass(frozen=True)
class Record:
    """A checked row: everything but the decoded image."""

    name: str
    problem: str
    solution: str
    image: Callable[[], Path | bytes]
    choices: tuple[str, ...] | None


class ImageTextDataset:
    """A sequence of `Example`s.

    name: "vc", "gr", or the folder's or file's name. skipped, notes: what was left out, and what was put right, as
    reason -> number of rows; both may still grow while images are decoded. cut_from: whose share the split is, "" if it
    is there by name.
    """

    def __init__(
        self, name: str, split: str, length: int, load: Callable[[int], tuple[Example, list[str]]], cut_from: str = ""
    ):
        self.name = name
        self.split = split
        self.cut_from = cut_from
        self.skipped: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self._length = length
        self._load = load
        self._seen: set[int] = set()
        self._broken: set[int] = set()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        """Row `index`, or the next good one after it if its image turns out to be broken: the same in every run."""
        if not 0 <= index < self._length:
            raise IndexError(f"{self.name}/{self.split} has {self._length} examples, got index {index}")
        for offset in range(self._length):
            candidate = (index + offset) % self._length
            if candidate in self._broken:
                continue
            try:
                example, notes = self._load(candidate)
            except BadImage as error:
                self._broken.add(candidate)
                self.skipped[str(error)] += 1
                continue
            if notes and candidate not in self._seen:
                self._seen.add(candidate)
                self.notes.update(notes)
            return example
        raise UserError(f"data {self.name!r} ({self.split}) has no image that can be decoded")

    def summary(self) -> str:
        """One line, such as "shapes/train: 80 examples; skipped 2: 2 x no answer; handled: 1 x ..."."""
        number = "endless" if self._length == ENDLESS else f"{self._length - len(self._broken)}"
        parts = [f"{self.name}/{self.split}: {number} examples"]
        if self.skipped:
            parts.append(f"skipped {self.skipped.total()}: {_listed(self.skipped)}")
        if self.notes:
            parts.append(f"handled: {_listed(self.notes)}")
        return "; ".join(parts)


def split_sizes(splits: Sequence[ImageTextDataset]) -> str:
    """One line, such as "shapes: train 27, validation 3 (cut from train), test 10"."""
    parts = [f"{one.split} {len(one)}" + (f" (cut from {one.cut_from})" if one.cut_from else "") for one in splits]
    return f"{splits[0].name}: {', '.join(parts)}"


def _listed(reasons: Counter[str]) -> str:
    return ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common())


def load_split(source: str | Path, split: str, *, count: int | None = None) -> ImageTextDataset:
    """The split "train", "validation" or "test" of an embedded task or of local data, at most `count` examples.

    source: "vc" or "gr"; else a folder or a .jsonl, .json, .csv or .parquet file, see `tables`. Files and folders that
    are named after a split are that split; one that is missing, and all three where nothing is named, are shares of the
    rest: 80 % train, 10 % validation, 10 % test of one fixed permutation, rows with the same image staying together.
    "all" is every row.

    Raises UserError (a ValueError) for an unknown split, for a source that is missing, empty or without a readable row
    in the split, and where a package is missing that its format or its solutions need.
    """
    if str(source) in TASKS and split in SPLITS:
        return _embedded(str(source), split, count)
    if split not in (*SPLITS, "all") or str(source) in TASKS:
        raise UserError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    path = Path(source)
    if not path.exists():
        hint = nearest(str(source), TASKS)
        raise UserError(f"data {str(source)!r} does not exist{hint}")
    tables = read_tables(path)
    _check_columns(path, tables)
    return _local(path, split, tables, count)


def _embedded(name: str, split: str, count: int | None) -> ImageTextDataset:
    task = TASKS[name]
    length = count if count is not None else task.split_size(split) or ENDLESS
    return ImageTextDataset(name, split, length, lambda index: (task.example(split, index), []))


# ---- local data: from rows to records -------------------------------------------------------------------------------


def _check_columns(path: Path, tables: Sequence[Table]) -> None:
    """A column that no row has is one mistake, not a thousand skipped rows."""
    columns: set[str] = set()
    for table in tables:
        if isinstance(table.rows, ArrowRows):
            columns.update(table.rows.dataset.column_names)
        else:
            columns.update(*(row for row in table.rows if isinstance(row, dict)))
    if not columns:
        return  # reported with the reasons, as no readable row
    known = columns | ({"image"} if "file_name" in columns else set())
    for column in COLUMNS:
        if column not in known:
            names = ", ".join(sorted(map(str, columns)))
            raise UserError(f"data {str(path)!r} has no column {column!r}; its columns are {names}")


def _local(path: Path, split: str, tables: Sequence[Table], count: int | None) -> ImageTextDataset:
    records, skipped, notes = _checked(tables, rows_of_split(tables, split), count)
    if not records:
        raise UserError(f"data {str(path)!r} has no readable row for {split}: {_why_none(tables, skipped)}")

    check_solutions(record.solution for record in records)

    def load(index: int) -> tuple[Example, list[str]]:
        record = records[index]
        image, image_notes = load_image(record.image())
        return Example(image, record.problem, record.solution, record.name, record.choices), image_notes

    name = path.resolve().stem if path.is_file() else path.resolve().name
    dataset = ImageTextDataset(name, split, len(records), load, cut_from(tables, split))
    dataset.skipped.update(skipped)
    dataset.notes.update(notes)
    return dataset


def _checked(
    tables: Sequence[Table], rows: Sequence[Place], count: int | None = None
) -> tuple[list[Record], Counter[str], Counter[str]]:
    """At most `count` good rows; what was left out, and what was put right."""
    records: list[Record] = []
    skipped: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    for t, r in rows:
        if count is not None and len(records) == count:
            break
        try:
            record, row_notes = _record(tables[t], r)
            check_image(record.image())
        except (BadRow, BadImage) as error:
            skipped[str(error)] += 1
            continue
        records.append(record)
        notes.update(row_notes)
    return records, skipped, notes


def _why_none(tables: Sequence[Table], skipped: Counter[str]) -> str:
    """Why a split has no good row, `skipped` being its bad ones."""
    if skipped:
        return _listed(skipped)
    records, skipped, _ = _checked(tables, all_rows(tables))
    if records:
        splits = {table.split for table in tables}
        of_others = f"all rows are of {', '.join(sorted(map(str, splits)))}"
        return "there are too few rows for it" if splits & {None, "train"} else of_others
    return _listed(skipped) or "there are no rows"


def _record(table: Table, row: int) -> tuple[Record, list[str]]:
    """Raises BadRow."""
    values = table.rows[row]
    if isinstance(values, str):
        raise BadRow(values)
    notes: list[str] = []
    problem = _text(values.get("problem"), "question", notes)
    if _IMAGE_MARKERS.search(problem):
        problem = _IMAGE_MARKERS.sub("", problem).strip()
        notes.append("image marker removed from the question")
    solution = _answer(_text(values.get("solution"), "answer", notes), notes)
    if not problem:
        raise BadRow("no question")
    choices = _choices(values.get("choices"), notes)
    return Record(f"{table.name}, row {row + 1}", problem, solution, _image(table, row, values), choices), notes


def _text(value: Any, what: str, notes: list[str]) -> str:
    """A cell as text: numbers are written out, a list of one is that one."""
    if isinstance(value, list | tuple) and len(value) == 1:
        notes.append(f"{what} taken out of a list")
        value = value[0]
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise BadRow(f"no {what}")
    if isinstance(value, int | float) and not isinstance(value, bool):
        notes.append(f"{what} is a number, not text")
        return str(int(value)) if math.isfinite(value) and value == int(value) else str(value)
    if not isinstance(value, str):
        raise BadRow(f"{what} is neither text nor a number")
    text = value.strip()
    if not text:
        raise BadRow(f"no {what}")
    return text


def _answer(text: str, notes: list[str]) -> str:
    answer = extract_answer(text)
    if answer is None:
        answer = _ANSWER_TAGS.sub("", text).strip()
        notes.append("answer without tags" if answer == text else "answer with broken tags")
    if not answer:
        raise BadRow("no answer")
    return answer


def _choices(value: Any, notes: list[str]) -> tuple[str, ...] | None:
    """A list of texts or numbers, or one in JSON; None if there is none."""
    if value is None or value in ("", []):
        return None
    if isinstance(value, str):
        with suppress(ValueError):
            value = json.loads(value)
    if isinstance(value, list | tuple) and all(isinstance(one, str | int | float) for one in value):
        return tuple(str(one) for one in value)
    notes.append("choices that are no list, ignored")
    return None


def _image(table: Table, row: int, values: dict[str, Any]) -> Callable[[], Path | bytes]:
    image = image_cell(values)
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes):
        return partial(_embedded_bytes, table, row)  # read again when needed, rather than all held in memory
    if isinstance(image, list) and image:
        raise BadRow("several images")
    if image is None or image == "" or image == []:
        raise BadRow("no image")
    if not isinstance(image, str):
        raise BadRow("image is neither a path nor image bytes")
    if re.match(r"[a-z]+://", image):
        raise BadRow("image is a web address, not a file")
    return partial(Path, table.folder, image)


def _embedded_bytes(table: Table, row: int) -> bytes:
    values = table.rows[row]
    assert isinstance(values, dict)
    image = image_cell(values)
    return image["bytes"] if isinstance(image, dict) else image
