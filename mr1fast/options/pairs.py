"""Options that are KEY=VALUE, separated by commas: how they are read, and written from a block of YAML."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

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


def written_pairs(block: Mapping[Any, Any]) -> str:
    """A block of YAML in the form of the command line; what is no text there is JSON."""
    return ",".join(f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in block.items())
