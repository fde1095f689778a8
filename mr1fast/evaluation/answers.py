"""An evaluation's answers on disk, a line of JSON each, written batch by batch, so that none is lost in the end."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mr1fast.evaluation.result import Answered

CHECK = "crc32"  # of the rest of a line


def append_answers(file: Path, answered: Sequence[Answered]) -> None:
    """Add a line for each, without R1-V's verdict, which depends on all problems."""
    for folder in (file.parent.parent, file.parent):  # but not a run's, which may have been moved away meanwhile
        folder.mkdir(exist_ok=True)
    rows = [{name: value for name, value in asdict(one).items() if name != "correct_as_r1v"} for one in answered]
    with file.open("a+b") as stream:
        if stream.tell():
            stream.seek(-1, 2)
            if stream.read() != b"\n":  # half a line, which a program that was killed has left
                stream.write(b"\n")
        stream.write("".join(json.dumps({**row, CHECK: _check(row)}) + "\n" for row in rows).encode())


def read_answers(file: Path) -> list[Answered]:
    """The whole lines of the file, the last one of each problem; [] without a file."""
    if not file.exists():
        return []
    lines = map(_answered, file.read_text(encoding="utf-8", errors="replace").splitlines())
    return list({one.index: one for one in lines if one is not None}.values())


def _answered(line: str) -> Answered | None:
    """None for a line that is damaged, half, or of another version."""
    try:
        row = json.loads(line)
        if CHECK in row and row.pop(CHECK) != _check(row):  # older versions wrote none
            return None
        return Answered(**{**row, "sampled_correct": tuple(row["sampled_correct"])})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _check(row: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(row).encode()):08x}"
