"""Which rows of local data are its train, validation and test split."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any

from mr1fast.data.tables import ArrowRows, Table

Place = tuple[int, int]  # table, row


def rows_of_split(tables: Sequence[Table], split: str) -> list[Place]:
    named = {table.split for table in tables} - {None, "train"}
    rest = [(t, r) for t, table in enumerate(tables) if table.split in (None, "train") for r in range(len(table.rows))]
    if split == "all":
        return all_rows(tables)
    if split in named:
        return [(t, r) for t, table in enumerate(tables) if table.split == split for r in range(len(table.rows))]
    groups: dict[Any, list[Place]] = {}
    for t, r in rest:
        groups.setdefault(_image_key(tables[t], r), []).append((t, r))
    keys = list(groups)
    random.Random("split/0").shuffle(keys)
    share = max(1, round(len(keys) / 10)) if len(keys) >= 3 else 0
    start = 0
    shares = {}
    for name in ("test", "validation"):
        stop = start + (0 if name in named else share)
        shares[name] = keys[start:stop]
        start = stop
    shares["train"] = keys[start:]
    return [place for key in shares[split] for place in groups[key]]


def all_rows(tables: Sequence[Table]) -> list[Place]:
    return [(t, r) for t, table in enumerate(tables) for r in range(len(table.rows))]


def cut_from(tables: Sequence[Table], split: str) -> str:
    """Whose share `validation` or `test` is if nothing is named after it, else ""."""
    named = {table.split for table in tables}
    if split in named or split not in ("validation", "test"):
        return ""
    return "train" if "train" in named else "the unnamed rows"


def _image_key(table: Table, row: int) -> Any:
    """The same for rows that show the same image, without opening any file."""
    if isinstance(table.rows, ArrowRows) and (digest := table.rows.image_digest(row)):
        return digest
    values = table.rows[row]
    image = image_cell(values) if isinstance(values, dict) else None
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes):
        return hashlib.blake2b(image, digest_size=16).digest()
    return (str(table.folder), image) if isinstance(image, str) and image else (id(table), row)


def image_cell(values: dict[str, Any]) -> Any:
    image = values.get("image")
    if image is None:
        image = values.get("file_name")  # an image folder's metadata
    if isinstance(image, list) and len(image) == 1:
        return image[0]
    return image
