"""What curves.png and samples.png share: nothing in data, models or the user's settings may stop a picture."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib.style


@contextmanager
def drawing() -> Iterator[None]:
    """matplotlib's own settings, not the user's, which may ask for LaTeX or for a font that is not there."""
    with matplotlib.style.context("default"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a box in its place is good enough
        yield


def drawable(text: str) -> str:
    """The text with U+FFFD in place of what is not printable: control characters, halves of UTF-16 surrogate pairs."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)
