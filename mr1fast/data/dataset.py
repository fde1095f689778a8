"""Examples to train on and to evaluate: the embedded tasks, or local data.

Data that is not clean is repaired or left out, counted by reason, and never stops a run: what can be seen from the rows
and the images' headers up front, the rest when an image is decoded.
"""

from __future__ import annotations

import hashlib
import os
import random
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

from mr1fast.checks import nearest
from mr1fast.data.columns import Reading
from mr1fast.data.example import Example, Examples
from mr1fast.data.identity import Place, image_keys, shared
from mr1fast.data.images import BadImage, load_image
from mr1fast.data.records import Checked
from mr1fast.data.sources import data_name, is_hub_name
from mr1fast.data.splits import Share, all_places, share_of
from mr1fast.data.tables import Table, check_columns, columns_of, read_tables
from mr1fast.data.tasks import SPLITS, TASKS, Task, check_split
from mr1fast.errors import UserError
from mr1fast.rewards import check_solutions

USUAL = Reading()
ENDLESS = 2**31 - 1  # the length of a split that is drawn on the fly, unless `count` limits it


class ImageTextDataset:
    """A sequence of `Example`s.

    name: "vc", "gr", or the folder's or file's name. skipped, notes: what was left out and what was repaired, as
    reason -> number of rows; both may grow while images are decoded. cut_from: the rows that the split was cut from, ""
    for a named split. shown_in, asked_in: for each held-out split, the number of train rows that show one of its
    images, and of text-only rows that ask one of its questions. columns: what was taken for what, where the names are
    not ours. tables, places: where the examples stand. pixels: of each image. rows, cut_from_rows: how many rows the
    split has and how many those that it was cut from, with unreadable ones and those beyond `count`; rows is None where
    the supply is endless. content: a digest of questions, answers and sizes of images, "" for an embedded task.
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
        self.asked_in: Counter[str] = Counter()
        self.columns = ""
        self.content = ""
        self.pixels: array[int] = array("q")
        self.tables: Sequence[Table] = ()
        self.places: list[Place] = []
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

    def count_shared(self, name: str, images: Collection[Place], texts: Collection[Place]) -> None:
        """Of these rows, which a held-out split or a data set to test on shares, count those that are examples here."""
        self.shown_in += Counter({name: sum(place in images for place in self.places)})
        self.asked_in += Counter({name: sum(place in texts for place in self.places)})

    @property
    def is_remarkable(self) -> bool:
        """Whether `summary` says more than the number of examples."""
        return any((self.skipped, self.notes, self.shown_in, self.asked_in, self.columns))

    def summary(self) -> str:
        """One line, such as "shapes/train: 80 examples; skipped 2: 2 x no answer; handled: 1 x ..."."""
        number = "endless" if self._length == ENDLESS else f"{self._length - len(self._broken)}"
        parts = [f"{self.name}/{self.split}: {number} examples"]
        if self.skipped:
            parts.append(f"skipped {self.skipped.total()}: {_listed(self.skipped)}")
        if self.notes:
            parts.append(f"handled: {_listed(self.notes)}")
        parts += [f"columns: {self.columns}"] if self.columns else []
        for counts, what in ((self.shown_in, "show an image"), (self.asked_in, "ask a question")):
            for name, rows in counts.items():
                whose = f"the {name} split" if name in SPLITS else name
                parts.append(f"warning: {rows} of them {what} of {whose}")
        return "; ".join(parts)


def count_shared(train: ImageTextDataset, other: ImageTextDataset) -> None:
    """Count the examples to train on that have an image, or in text alone a question, of data to test on."""
    offset = len(train.tables)
    theirs = [(table + offset, row) for table, row in other.places]
    keys = image_keys([*train.tables, *other.tables], [*train.places, *theirs])
    train.count_shared(other.name, *shared(keys, train.places, theirs))


def split_sizes(splits: Sequence[ImageTextDataset]) -> str:
    """One line, such as "shapes: train 27, validation 3 (cut from train), test 10"."""
    parts = [f"{one.split} {len(one)}" + (f" (cut from {one.cut_from})" if one.cut_from else "") for one in splits]
    return f"{splits[0].name}: {', '.join(parts)}"


def _listed(reasons: Counter[str]) -> str:
    return ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common())


def load_split(
    source: str | Path,
    split: str | None,
    *,
    count: int | None = None,
    sample_seed: int | None = None,
    used: Collection[str] = SPLITS,
    cut: bool = True,
    reading: Reading = USUAL,
    reworded: bool = False,
) -> ImageTextDataset:
    """The split "train", "validation" or "test" of an embedded task or of local data, at most `count` examples.

    An embedded task may have more splits, and may ask `reworded` questions, see `tasks.Task`.

    source: "vc" or "gr"; else a folder, a .jsonl, .json, .csv or .parquet file, or a name on the hub, see `tables`.
    Files and folders named after a split belong to that split; all others are train, see `splits.share_of`. "all" is
    every row. None is "test", or "all" for a single file that is not named test; without `cut`, also for a folder that
    has no test split.
    sample_seed: the `count` examples are not the first ones, but drawn by this seed.
    used: the splits that the caller uses; `train` is cut for these only, and its images are compared with these only.
    reading: what the columns of local data are called, and where its images are.

    Raises UserError (a ValueError) for an unknown split, for a source that is missing, empty or has no readable row in
    the split, and if a package is missing that its format or its solutions need.
    """
    if (task := TASKS.get(str(source))) is not None:
        return _embedded(task, split or "test", count, sample_seed, reworded)
    if split not in (None, *SPLITS, "all"):
        raise UserError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    path = Path(source)
    if not os.path.exists(path) and not is_hub_name(str(source)):
        hint = nearest(str(source), TASKS)
        raise UserError(f"data {str(source)!r} does not exist{hint}")
    tables = read_tables(path, reading)
    check_columns(path, tables)
    if split is None:
        has_test = any(table.split == "test" for table in tables)
        split = "test" if has_test or (cut and not path.is_file()) else "all"
    share = share_of(tables, split, used)
    if sample_seed is not None:
        random.Random(f"samples/{sample_seed}").shuffle(share.places)
    return _local(path, split, tables, share, count)


def _embedded(task: Task, split: str, count: int | None, sample_seed: int | None, reworded: bool) -> ImageTextDataset:
    check_split(task, split)
    there = task.splits[split] or ENDLESS
    length = there if count is None else min(there, count)
    drawn: Sequence[int] = range(length)
    if sample_seed is not None:
        drawn = random.Random(f"samples/{sample_seed}").sample(range(there), length)

    def load(index: int) -> tuple[Example, list[str]]:
        return task.example(split, drawn[index], reworded=reworded), []

    dataset = ImageTextDataset(task.name, split, length, load)
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
        raise UserError(nothing_to_ask(dataset))


def nothing_to_ask(dataset: Examples) -> str:
    """What to say where no problem can be used."""
    why = f": {dataset.summary()}" if isinstance(dataset, ImageTextDataset) else ""
    return f"there is no problem that can be asked{why}"


def problem_at(dataset: Examples, index: int) -> Example | None:
    """The problem with exactly this index; None if the row turns out to be unusable."""
    return dataset.own(index) if isinstance(dataset, ImageTextDataset) else dataset[index]


# ---- local data -----------------------------------------------------------------------------------------------------


def _local(path: Path, split: str, tables: Sequence[Table], share: Share, count: int | None) -> ImageTextDataset:
    checked = Checked.of(tables, share.places, count)
    skipped, records = checked.skipped, checked.records
    skipped.update(table.unreadable for table in share.tables if table.unreadable)
    if not records:
        raise UserError(f"data {str(path)!r} has no readable row for {split}: {_why_none(tables, split, skipped)}")
    check_solutions(record.solution for record in records)

    def load(index: int) -> tuple[Example, list[str]]:
        record = records[index]
        loaded = [load_image(image) for image in record.images()]
        images = tuple(image for image, _ in loaded)
        cells = (record.problem, record.solution, record.name, record.choices, record.columns())
        example = Example(images[0] if images else None, *cells, more_images=images[1:])
        return example, [note for _, notes in loaded for note in notes]

    dataset = ImageTextDataset(data_name(str(path)), split, len(records), load, share.cut_from)
    dataset.rows, dataset.cut_from_rows = len(share.places), sum(len(table.rows) for table in share.tables)
    dataset.skipped.update(skipped)
    dataset.notes.update(checked.notes)
    dataset.notes.update(table.note for table in share.tables if table.note)
    dataset.tables, dataset.places = tables, checked.places
    for held_out, (images, texts) in share.shared.items():
        dataset.count_shared(held_out, images, texts)
    dataset.columns = tables[0].reading.described(columns_of(share.tables))
    dataset.pixels = checked.pixels
    dataset.content = _digest(checked)
    return dataset


def _digest(checked: Checked) -> str:
    texts = [(record.problem, record.solution, record.choices) for record in checked.records]
    return hashlib.blake2b(repr((texts, checked.pixels.tolist())).encode(errors="replace"), digest_size=16).hexdigest()


def _why_none(tables: Sequence[Table], split: str, skipped: Counter[str]) -> str:
    """Why a split has no good row; skipped: its bad rows."""
    if skipped:
        return _listed(skipped)
    checked, splits = Checked.of(tables, all_places(tables)), {table.split for table in tables}
    if checked.records and split not in splits:
        of_others = f"all rows are of {', '.join(sorted(map(str, splits)))}"
        return "there are too few rows for it" if splits & {None, "train"} else of_others
    checked.skipped.update(table.unreadable for table in tables if table.unreadable)
    return _listed(checked.skipped) or "there are no rows"
