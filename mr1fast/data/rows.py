"""What a row of a table has, whatever its columns are called: question, answer, images. What it lacks is a BadRow."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

from mr1fast.data.cells import BadRow, answer_of, question_of
from mr1fast.data.chats import Chat, chat_of
from mr1fast.data.columns import first_filled, is_empty
from mr1fast.data.tables import Table

TEXT_ONLY = "no image, asked in text alone"
OUTSIDE = "image is outside the folder of the data (--allow-outside reads it)"
_BASE64 = re.compile(rb"[A-Za-z0-9+/_=\s-]*")


def question_and_answer(table: Table, row: int, images: int, notes: list[str]) -> tuple[str, str]:
    """The question about so many images, and its answer alone; repairs are appended to `notes`. Raises BadRow."""
    values = cells_of(table, row)
    problem, solution, chat = table.reading.cell(values, "problem"), None, _chat(table, values)
    if chat is not None:
        problem, solution = chat.question, chat.answer
        notes += chat.left_out
    marked: list[str] = []
    question = question_of(problem, marked, images)
    if not images:
        if any(note.startswith("image marker") for note in marked):
            raise BadRow("question marks the place of an image, but the row has none")
        notes.append(TEXT_ONLY)
    notes += marked
    given = table.reading.cell(values, "solution")
    return question, answer_of(solution if given is None else given, notes)


def images_of(table: Table, row: int) -> list[Path | bytes]:
    """The files of the images, or their content where the row holds that. Raises BadRow; the files need not exist."""
    values = cells_of(table, row)
    cell = _as_list(table.reading.cell(values, "image"))
    if not cell and (chat := _chat(table, values)) is not None:
        cell = chat.images
    return [_image(item, table) for item in cell]


def others_of(table: Table, row: int) -> dict[str, Any]:
    """The cells that reward functions are not told anyway; None where the row has none, or has bytes."""
    values = cells_of(table, row)
    told = {"problem", "solution", "choices", *table.reading.names("image")}
    return {name: None if _has_bytes(values.get(name)) else values.get(name) for name in sorted(table.columns - told)}


def cells_of(table: Table, row: int) -> Mapping[str, Any]:
    values = table.rows[row]
    if isinstance(values, str):
        raise BadRow(values)
    return values


def _chat(table: Table, values: Mapping[str, Any]) -> Chat | None:
    """The chat in the column of the question or, where that has nothing and nobody has named it, in one of chats."""
    cell = table.reading.cell(values, "problem")
    return chat_of(first_filled(values, table.reading.chats) if cell is None else cell)


def _has_bytes(value: Any) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, bytes) or (isinstance(value, list | tuple) and any(map(_has_bytes, value)))


# ---- images ---------------------------------------------------------------------------------------------------------


def _as_list(cell: Any) -> list[Any]:
    if isinstance(cell, str) and cell.lstrip().startswith("["):  # a list in a CSV file
        with suppress(ValueError, RecursionError):
            cell = json.loads(cell)
    if is_empty(cell):
        return []
    return list(cell) if isinstance(cell, list | tuple) else [cell]


def _image(cell: Any, table: Table) -> Path | bytes:
    if isinstance(cell, dict):
        cell = first_filled(cell, ("bytes", "path", "url"))
    if isinstance(cell, bytes):
        return cell
    if not isinstance(cell, str) or not cell:
        raise BadRow("image is neither a path nor image bytes")
    located = _located(cell, table.folder)
    return located if isinstance(located, bytes) else _inside(located, table)


def _inside(path: Path, table: Table) -> Path:
    """The path. Raises BadRow if it leads out of the data, by itself or by a link, unless the user allows that."""
    try:
        real = Path(os.path.realpath(path))
    except ValueError:  # a character that no path has
        raise BadRow("image cannot be read") from None
    if not table.reading.allow_outside and not any(real.is_relative_to(root) for root in table.roots):
        raise BadRow(OUTSIDE)
    return path


def _located(image: str, folder: Path) -> Path | bytes:
    """The image behind a path, or behind a URL that needs no network."""
    if re.match("data:[^,]*,", image, re.IGNORECASE):
        return _content_of_url(image)
    if re.match("file:", image, re.IGNORECASE):
        # urlsplit cuts off what follows an unescaped ? or #, which no image's name need lack.
        try:
            url = urlsplit(image.replace("?", "%3F").replace("#", "%23"))
        except ValueError:  # file://[
            raise BadRow("image is not a valid URL") from None
        if url.netloc not in ("", "localhost"):
            raise BadRow("image is on another machine, not a file")
        return folder / url2pathname(url.path)
    if re.match("[a-z][a-z0-9+.-]*://", image, re.IGNORECASE):
        raise BadRow("image is a web address, not a file")
    return folder / image


def _content_of_url(url: str) -> bytes:
    """The content of `data:[type][;base64],content`. Pure Base64 is decoded even without `;base64`."""
    kind, _, content = url.partition(",")
    data = unquote_to_bytes(content)
    if _BASE64.fullmatch(data):
        letters = re.sub(rb"[\s=]", b"", data).translate(bytes.maketrans(b"-_", b"+/"))
        try:
            return base64.b64decode(letters + b"=" * (-len(letters) % 4), validate=True)
        except ValueError:
            raise BadRow("image is not valid Base64") from None
    if ";base64" in kind.lower():
        raise BadRow("image is not valid Base64")
    return data
