"""--columns, --image-root and --allow-outside: how the user's own data is read."""

from __future__ import annotations

import os
from pathlib import Path

from mr1fast.data.columns import Reading, parse_columns
from mr1fast.errors import UserError


def check_no_reading(columns: str | None, image_root: str | None, allow_outside: bool) -> None:
    """Raises UserError for options about the user's own data, where there is none."""
    for name, value in (("--columns", columns), ("--image-root", image_root), ("--allow-outside", allow_outside)):
        if value:
            raise UserError(f"{name} is about your own data, and there is no --data")


def read_as(columns: str | None, image_root: str | None, allow_outside: bool) -> Reading:
    """What these options say. Raises UserError."""
    named = {} if columns is None else parse_columns(columns, "--columns")
    root = None if image_root is None else Path(os.path.abspath(image_root))
    return Reading(named, root, allow_outside=allow_outside)
