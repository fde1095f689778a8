"""Rows that can be used, and why others cannot."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mr1fast.data.cells import BadRow, choices_of
from mr1fast.data.identity import Place
from mr1fast.data.images import BadImage, check_image
from mr1fast.data.rows import cells_of, images_of, others_of, question_and_answer
from mr1fast.data.tables import Table


@dataclass(frozen=True)
class Record:
    """A checked row: everything but the decoded image."""

    name: str
    problem: str
    solution: str
    images: Callable[[], list[Path | bytes]]  # read again when needed, rather than all held in memory
    choices: tuple[str, ...] | None
    columns: Callable[[], dict[str, Any]]  # the other cells, of which there may be many


@dataclass(frozen=True)
class Checked:
    """Good rows and the pixels of their images; what was left out, and what was repaired."""

    records: list[Record] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)  # of the records
    skipped: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    pixels: array[int] = field(default_factory=lambda: array("q"))

    @classmethod
    def of(cls, tables: Sequence[Table], places: Sequence[Place], count: int | None = None) -> Checked:
        """At most `count` good rows."""
        checked = cls()
        for t, r in places:
            if count is not None and len(checked.records) == count:
                break
            try:
                record, row_notes = _record(tables[t], r)
                pixels = [check_image(image) for image in record.images()]
            except (BadRow, BadImage) as error:
                checked.skipped[str(error)] += 1
                continue
            checked.records.append(record)
            checked.places.append((t, r))
            checked.pixels.extend(pixels)
            checked.notes.update(row_notes)
        return checked


def _record(table: Table, row: int) -> tuple[Record, list[str]]:
    """Raises BadRow."""
    notes: list[str] = []
    images = partial(images_of, table, row)
    problem, solution = question_and_answer(table, row, len(images()), notes)
    choices = choices_of(table.reading.cell(cells_of(table, row), "choices"), notes)
    return Record(
        f"{table.name}, row {row + 1}", problem, solution, images, choices, partial(others_of, table, row)
    ), notes
