"""Finished arms on disk: a JSON file each, with what it was computed by, so that results never mix."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mr1fast.errors import UserError
from mr1fast.reproduction.experiments import BASE_RUN, Run
from mr1fast.training.run_folder import write_json


@dataclass(frozen=True)
class Records:
    """folder: of the results. computed_by: the fingerprint of code and base, "" to take whatever is there."""

    folder: Path
    computed_by: str = ""

    def file(self, run: Run) -> Path:
        return self.folder / "arms" / f"{run.name}.json"

    def write(self, run: Run, settings: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        identity = {"run": asdict(run), "settings": settings, "computed_by": self.computed_by}
        write_json(self.file(run), {**identity, "settings_digest": digest(settings), **result})

    def read(self, run: Run) -> dict[str, Any] | None:
        """None if it has not been run. Raises UserError if the file is damaged."""
        file = self.file(run)
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            record["tests"], record["computed_by"], record["settings_digest"]  # they must be there
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{file} is damaged; move it away, and the arm will be run again") from None
        return record

    def finished(self, runs: Iterable[Run], settings: Mapping[Run, Mapping[str, Any]]) -> dict[Run, dict[str, Any]]:
        """Those of the runs that have been run. Raises UserError if one was computed by other code or settings."""
        found = {run: record for run in runs if (record := self.read(run)) is not None}
        others = [run for run, record in found.items() if self._differs(record, settings[run])]
        if others:
            raise UserError(
                f"{len(others)} of the {len(found)} finished arms in {self.folder} (such as {others[0].name}) were "
                "computed by other code, settings or another base than these; choose another --output-dir, or draw "
                "what is there with --redraw"
            )
        return found

    def _differs(self, record: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
        return record["settings_digest"] != digest(settings) or record["computed_by"] != self.computed_by

    def all(self, runs: Iterable[Run]) -> dict[Run, dict[str, Any]]:
        """Those of the runs that have been run, by whatever, but all by the same code. Raises UserError."""
        found = {run: record for run in runs if (record := self.read(run)) is not None}
        if not found or BASE_RUN not in found:
            raise UserError(f"{self.folder} has no finished arms to draw, or not the base's figures")
        if len({record["computed_by"] for record in found.values()}) > 1:
            raise UserError(f"the arms in {self.folder} were computed by different versions of the code or the base")
        return found


def digest(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]
