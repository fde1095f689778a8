"""An evaluation's answers on disk, a line of JSON each, written batch by batch, so that none is lost in the end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mr1fast.evaluation.result import Answered


def append_answers(file: Path, answered: Sequence[Answered]) -> None:
    """Add a line for each, without R1-V's verdict, which depends on all problems."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [{name: value for name, value in asdict(one).items() if name != "correct_as_r1v"} for one in answered]
    with file.open("a+b") as stream:
        if stream.tell():
            stream.seek(-1, 2)
            if stream.read() != b"\n":  # half a line, which a program that was killed has left
                stream.write(b"\n")
        stream.write("".join(json.dumps(row) + "\n" for row in rows).encode())


def read_answers(file: Path) -> list[Answered]:
    """The whole lines of the file, the last one of each problem; [] without a file."""
    if not file.exists():
        return []
    found: dict[int, Answered] = {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            one = Answered(**{**row, "sampled_correct": tuple(row["sampled_correct"])})
        except (ValueError, TypeError, KeyError):  # half a line, or one of another version
            continue
        found[one.index] = one
    return list(found.values())
