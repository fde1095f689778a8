"""The rows of a run's metrics.jsonl, as training writes them and curves and pages read them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def rows_in(file: Path) -> Iterator[dict[str, Any]]:
    """The complete rows of metrics.jsonl, if there is one: a run that was killed may have left half a line.

    One at a time, as all rows of a long run together take much memory.
    """
    if not file.exists():
        return
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                yield row
