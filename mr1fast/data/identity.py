"""Which rows show the same image."""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

from mr1fast.data.cells import BadRow, image_of
from mr1fast.data.tables import Table

Place = tuple[int, int]  # table, row
_END = 4096  # bytes


def image_keys(tables: Sequence[Table], places: Iterable[Place]) -> dict[Place, Hashable]:
    """A key for each row, the same for rows whose images are the same bytes, however they are kept, named or spelt.

    There may be gigabytes of images, so only those that agree in length and at both ends are read as a whole. The key
    of an image that cannot be read is its path, and that of a row without an image is its place.
    """
    known: dict[tuple[Callable, Path], Hashable] = {}

    def key(read: Callable[[BinaryIO], bytes], place: Place) -> Hashable:
        try:
            source = image_of(tables[place[0]], place[1])
        except BadRow:
            return place
        if isinstance(source, bytes):
            return read(io.BytesIO(source))
        if (read, source) not in known:
            known[read, source] = _key_of_file(read, source)
        return known[read, source]

    sketches = {place: key(_ends, place) for place in places}
    counts = Counter(sketches.values())
    return {place: sketch if counts[sketch] == 1 else key(_whole, place) for place, sketch in sketches.items()}


def _key_of_file(read: Callable[[BinaryIO], bytes], file: Path) -> Hashable:
    try:
        if file.is_file():  # a pipe would have us wait
            with file.open("rb") as content:
                return read(content)
    except OSError:
        pass
    return os.path.abspath(file)


def _ends(content: BinaryIO) -> bytes:
    size = content.seek(0, io.SEEK_END)
    content.seek(0)
    first = content.read(_END)
    content.seek(max(0, size - _END))
    return hashlib.blake2b(b"%d " % size + first + content.read(_END), digest_size=16).digest()


def _whole(content: BinaryIO) -> bytes:
    return hashlib.file_digest(content, "blake2b").digest()  # type: ignore[arg-type]  # the stub wants more than it needs
