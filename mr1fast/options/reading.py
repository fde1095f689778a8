"""--columns and --image-root: how the user's own data is read."""

from __future__ import annotations

import os
from pathlib import Path

from mr1fast.data.columns import Reading, parse_columns
from mr1fast.errors import UserError


def check_no_reading(columns: str | None, image_root: str | None) -> None:
    """Raises UserError for options about the user's own data, where there is none."""
    for name, value in (("--columns", columns), ("--image-root", image_root)):
        if value is not None:
            raise UserError(f"{name} is about your own data, and there is no --data")


def read_as(columns: str | None, image_root: str | None) -> Reading:
    """What --columns and --image-root say. Raises UserError."""
    named = {} if columns is None else parse_columns(columns, "--columns")
    return Reading(named, None if image_root is None else Path(os.path.abspath(image_root)))
