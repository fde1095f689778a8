"""What a user is told about a name that is not known. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: object, known: Iterable[str]) -> str:
    """ " (did you mean 'X'?)", or nothing."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def not_one_of(name: str, value: object, known: Iterable[str]) -> str:
    known = list(known)
    return f"{name} must be one of {', '.join(known)}, got {value!r}{nearest(value, known)}"
