"""Options that are KEY=VALUE, separated by commas."""

from __future__ import annotations

import re

from mr1fast.errors import UserError

_NEXT = re.compile(r",(?=\s*[A-Za-z_]\w*\s*=)")  # a comma within a value stays there


def parse_pairs(text: str, source: str) -> dict[str, str]:
    """Key -> value, as text. Raises UserError for something else than KEY=VALUE and for a key that is there twice."""
    pairs: dict[str, str] = {}
    for part in _NEXT.split(text):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", key):
            raise UserError(f"{source} must be KEY=VALUE, separated by commas, got {part.strip()!r}")
        if key in pairs:
            raise UserError(f"{source} sets {key} twice")
        pairs[key] = value
    return pairs
