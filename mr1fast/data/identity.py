"""Which rows show the same image, or ask the same in text alone."""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from mr1fast.data.cells import BadRow
from mr1fast.data.rows import images_of, question_and_answer
from mr1fast.data.tables import Table

Place = tuple[int, int]  # table, row
_END = 4096  # bytes
_TEXT = "text"


def image_keys(tables: Sequence[Table], places: Iterable[Place]) -> dict[Place, frozenset[Hashable]]:
    """The keys of each row's images: the same for images of the same bytes, however they are kept, named or spelt.

    There may be gigabytes of images, so only those that agree in length and at both ends are read as a whole. The key
    of an image that cannot be read is its path. A row without images has the key of its question.
    """
    known: dict[tuple[Callable, Path], Hashable] = {}

    def key(read: Callable[[BinaryIO], bytes], source: Path | bytes) -> Hashable:
        if isinstance(source, bytes):
            return read(io.BytesIO(source))
        if (read, source) not in known:
            known[read, source] = _key_of_file(read, source)
        return known[read, source]

    def keys(read: Callable[[BinaryIO], bytes], place: Place) -> frozenset[Hashable]:
        try:
            images = images_of(tables[place[0]], place[1])
            if not images:
                return frozenset([(_TEXT, question_and_answer(tables[place[0]], place[1], 0, [])[0])])
        except BadRow:
            return frozenset([place])
        return frozenset(key(read, image) for image in images)

    sketches = {place: keys(_ends, place) for place in places}
    counts = Counter(sketch for row in sketches.values() for sketch in row)
    return {
        place: row if all(counts[sketch] == 1 for sketch in row) else keys(_whole, place)
        for place, row in sketches.items()
    }


def shared(
    keys: Mapping[Place, frozenset[Hashable]], ours: Iterable[Place], theirs: Iterable[Place]
) -> tuple[set[Place], set[Place]]:
    """Of our rows, those with an image that theirs have too, and those of text alone whose question theirs have too."""
    known = frozenset().union(*(keys[place] for place in theirs))
    both = {place for place in ours if keys[place] & known}
    texts = {place for place in both if any(isinstance(key, tuple) and key[0] == _TEXT for key in keys[place])}
    return both - texts, texts


def connected(keys: Mapping[Place, frozenset[Hashable]]) -> dict[Place, Hashable]:
    """A name for each row, the same for rows that share an image, or that others connect by the images they share."""
    above: dict[Hashable, Hashable] = {}

    def top(key: Hashable) -> Hashable:
        while (higher := above.setdefault(key, key)) != key:
            above[key] = above[higher]  # shortens the way for the next one
            key = above[key]
        return key

    for row in keys.values():
        first, *others = row
        for other in others:
            above[top(other)] = top(first)
    return {place: top(next(iter(row))) for place, row in keys.items()}


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
