"""Examples to train on and to evaluate: the embedded tasks, or local data with the columns image, problem, solution.

Data that is not clean is repaired or left out, counted by reason, and never stops a run: what can be seen from the rows
and the images' headers up front, the rest when an image is decoded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mr1fast.checks import nearest
from mr1fast.data.cells import BadRow, answer_of, choices_of, image_of, others_of, question_of
from mr1fast.data.example import Example, Examples
from mr1fast.data.identity import Place
from mr1fast.data.images import BadImage, check_image, load_image
from mr1fast.data.splits import all_places, share_of
from mr1fast.data.tables import Table, check_columns, read_tables
from mr1fast.data.tasks import SPLITS, TASKS
from mr1fast.data.text_files import whole_characters
from mr1fast.errors import UserError
from mr1fast.rewards import check_solutions

ENDLESS = 2**31 - 1  # the length of a split that is drawn on the fly, unless `count` limits it


@dataclass(frozen=True)
class Record:
    """A checked row: everything but the decoded image."""

    name: str
    problem: str
    solution: str
    image: Callable[[], Path | bytes]  # read again when needed, rather than all held in memory
    choices: tuple[str, ...] | None
    columns: Callable[[], dict[str, Any]]  # the other cells, of which there may be many


class ImageTextDataset:
    """A sequence of `Example`s.

    name: "vc", "gr", or the folder's or file's name. skipped, notes: what was left out and what was repaired, as
    reason -> number of rows; both may grow while images are decoded. cut_from: the rows that the split was cut from, ""
    for a named split. shown_in: for each held-out split, the number of train rows that show one of its images. rows,
    cut_from_rows: how many rows the split has and how many those that it was cut from, with unreadable ones and those
    beyond `count`; rows is None where the supply is endless.
    """

    def __init__(
        self, name: str, split: str, length: int, load: Callable[[int], tuple[Example, list[str]]], cut_from: str = ""
    ):
        self.name = name
        self.split = split
        self.cut_from = cut_from
        self.rows: int | None = length
        self.cut_from_rows = length
        self.shown_in: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self._length = length
        self._load = load
        self._seen: set[int] = set()
        self._broken: set[int] = set()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        """Row `index`, or if that turns out to be unusable the next good one, which is the same in every run."""
        for offset in range(self._length):
            example = self.own(index if offset == 0 else (index + offset) % self._length)
            if example is not None:
                return example
        raise UserError(f"data {self.name!r} ({self.split}) has no row that can be used: {_listed(self.skipped)}")

    def own(self, index: int) -> Example | None:
        """Row `index` itself; None if its image turns out to be broken, or `leave_out` leaves it out."""
        if not 0 <= index < self._length:
            raise IndexError(f"{self.name}/{self.split} has {self._length} examples, got index {index}")
        if index in self._broken:
            return None
        try:
            example, notes = self._load(index)
        except BadImage as error:
            self._broken.add(index)
            self.skipped[str(error)] += 1
            return None
        if notes and index not in self._seen:
            self._seen.add(index)
            self.notes.update(notes)
        return example

    def leave_out(self, why_not: Callable[[Example], str | None]) -> None:
        """From now on, also leave out and count the rows for which `why_not` has a reason; it is asked once a row."""
        load, good = self._load, set[int]()

        def checked(index: int) -> tuple[Example, list[str]]:
            example, notes = load(index)
            if index not in good:
                if (reason := why_not(example)) is not None:
                    raise BadImage(reason)
                good.add(index)
            return example, notes

        self._load = checked

    def summary(self) -> str:
        """One line, such as "shapes/train: 80 examples; skipped 2: 2 x no answer; handled: 1 x ..."."""
        number = "endless" if self._length == ENDLESS else f"{self._length - len(self._broken)}"
        parts = [f"{self.name}/{self.split}: {number} examples"]
        if self.skipped:
            parts.append(f"skipped {self.skipped.total()}: {_listed(self.skipped)}")
        if self.notes:
            parts.append(f"handled: {_listed(self.notes)}")
        parts += [f"warning: {rows} of them show an image of the {name} split" for name, rows in self.shown_in.items()]
        return "; ".join(parts)


def split_sizes(splits: Sequence[ImageTextDataset]) -> str:
    """One line, such as "shapes: train 27, validation 3 (cut from train), test 10"."""
    parts = [f"{one.split} {len(one)}" + (f" (cut from {one.cut_from})" if one.cut_from else "") for one in splits]
    return f"{splits[0].name}: {', '.join(parts)}"


def _listed(reasons: Counter[str]) -> str:
    return ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common())


def load_split(
    source: str | Path, split: str | None, *, count: int | None = None, used: Collection[str] = SPLITS
) -> ImageTextDataset:
    """The split "train", "validation" or "test" of an embedded task or of local data, at most `count` examples.

    source: "vc" or "gr"; else a folder or a .jsonl, .json, .csv or .parquet file, see `tables`. Files and folders named
    after a split belong to that split; all others are train, see `splits.share_of`. "all" is every row. None is "test",
    or "all" for a single file that is not named test.
    used: the splits that the caller uses; `train` is cut for these only, and its images are compared with these only.

    Raises UserError (a ValueError) for an unknown split, for a source that is missing, empty or has no readable row in
    the split, and if a package is missing that its format or its solutions need.
    """
    if str(source) in TASKS and split in (None, *SPLITS):
        return _embedded(str(source), split or "test", count)
    if split not in (None, *SPLITS, "all") or str(source) in TASKS:
        raise UserError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    path = Path(source)
    if not path.exists():
        hint = nearest(str(source), TASKS)
        raise UserError(f"data {str(source)!r} does not exist{hint}")
    tables = read_tables(path)
    check_columns(path, tables)
    if split is None:
        split = "all" if path.is_file() and tables[0].split != "test" else "test"
    return _local(path, split, tables, count, used)


def _embedded(name: str, split: str, count: int | None) -> ImageTextDataset:
    task = TASKS[name]
    length = min(task.splits[split] or ENDLESS, ENDLESS if count is None else count)
    dataset = ImageTextDataset(name, split, length, lambda index: (task.example(split, index), []))
    dataset.rows = task.splits[split]
    return dataset


def problems(dataset: Examples) -> Iterator[tuple[int, Example]]:
    """(index, example) of each problem, once; unusable rows are left out, while `dataset[index]` would replace them.

    Raises UserError if there is none at all.
    """
    found = False
    for index in range(len(dataset)):
        example = problem_at(dataset, index)
        if example is not None:
            found = True
            yield index, example
    if not found:
        why = f": {dataset.summary()}" if isinstance(dataset, ImageTextDataset) else ""
        raise UserError(f"there is no problem that can be asked{why}")


def problem_at(dataset: Examples, index: int) -> Example | None:
    """The problem with exactly this index; None if the row turns out to be unusable."""
    return dataset.own(index) if isinstance(dataset, ImageTextDataset) else dataset[index]


def data_name(path: Path) -> str:
    """What local data is called: the name of its folder, or of its file without the ending."""
    return whole_characters(path.resolve().stem if path.is_file() else path.resolve().name)


# ---- local data: from rows to records -------------------------------------------------------------------------------


def _local(
    path: Path, split: str, tables: Sequence[Table], count: int | None, used: Collection[str]
) -> ImageTextDataset:
    share = share_of(tables, split, used)
    records, skipped, notes = _checked(tables, share.places, count)
    skipped.update(table.unreadable for table in share.tables if table.unreadable)
    notes.update(table.note for table in share.tables if table.note)
    if not records:
        raise UserError(f"data {str(path)!r} has no readable row for {split}: {_why_none(tables, split, skipped)}")
    check_solutions(record.solution for record in records)

    def load(index: int) -> tuple[Example, list[str]]:
        record = records[index]
        image, image_notes = load_image(record.image())
        cells = (record.problem, record.solution, record.name, record.choices, record.columns())
        return Example(image, *cells), image_notes

    dataset = ImageTextDataset(data_name(path), split, len(records), load, share.cut_from)
    dataset.rows, dataset.cut_from_rows = len(share.places), sum(len(table.rows) for table in share.tables)
    dataset.skipped.update(skipped)
    dataset.notes.update(notes)
    dataset.shown_in.update(share.shown_in)
    return dataset


def _checked(
    tables: Sequence[Table], places: Sequence[Place], count: int | None = None
) -> tuple[list[Record], Counter[str], Counter[str]]:
    """At most `count` good rows; what was left out, and what was repaired."""
    records: list[Record] = []
    skipped: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    for t, r in places:
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


def _why_none(tables: Sequence[Table], split: str, skipped: Counter[str]) -> str:
    """Why a split has no good row; skipped: its bad rows."""
    if skipped:
        return _listed(skipped)
    records, skipped, _ = _checked(tables, all_places(tables))
    splits = {table.split for table in tables}
    if records and split not in splits:
        of_others = f"all rows are of {', '.join(sorted(map(str, splits)))}"
        return "there are too few rows for it" if splits & {None, "train"} else of_others
    skipped.update(table.unreadable for table in tables if table.unreadable)
    return _listed(skipped) or "there are no rows"


def _record(table: Table, row: int) -> tuple[Record, list[str]]:
    """Raises BadRow."""
    values = table.rows[row]
    if isinstance(values, str):
        raise BadRow(values)
    notes: list[str] = []
    problem = question_of(values.get("problem"), notes)
    solution = answer_of(values.get("solution"), notes)
    choices = choices_of(values.get("choices"), notes)
    image_of(table, row)
    image, others = partial(image_of, table, row), partial(others_of, table, row)
    return Record(f"{table.name}, row {row + 1}", problem, solution, image, choices, others), notes
