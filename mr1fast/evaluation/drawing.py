"""What curves.png and samples.png share: nothing in data, models or the user's settings may stop a picture."""

from __future__ import annotations

import logging
import sys
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import matplotlib.style
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

FONT = "DejaVu Sans"  # which matplotlib brings with it
# Fonts with Chinese, Japanese and Korean characters; the first one that is installed helps out.
CJK_FONTS = (
    *(
        "Noto Sans CJK SC",
        "Noto Sans CJK JP",
        "Noto Sans CJK TC",
        "Noto Sans CJK KR",
        "Noto Sans SC",
        "Source Han Sans SC",
    ),
    *("WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Droid Sans Fallback"),
    *("PingFang SC", "Hiragino Sans GB", "Heiti SC", "Arial Unicode MS", "Microsoft YaHei", "SimHei", "SimSun"),
)


@contextmanager
def drawing() -> Iterator[None]:
    """matplotlib's own settings, not the user's, which may ask for LaTeX or for a font that is not there."""
    with matplotlib.style.context(["default", {"font.family": _families()}]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # it can only be of one weight of a font
        log = logging.getLogger("matplotlib.font_manager")
        level = log.level
        log.setLevel(logging.ERROR)  # it warns that a font for Chinese has no bold
        try:
            yield
        finally:
            log.setLevel(level)


def drawable(text: str) -> str:
    """The text with U+FFFD in place of what is not printable: control characters, halves of UTF-16 surrogate pairs.

    A character that no font has is escaped, such as \\u6bcf, which is said once.
    """
    return "".join(map(_drawn, text))


def clipped(text: str, lines: int, width: int) -> str:
    """At most so many lines of so many columns, as `drawable` will draw them, and a sign that there was more.

    Words stay whole where they can; text with wide characters, which has no spaces, is broken anywhere.
    """
    rows, used = [""], 0
    for space, piece in _pieces(text[: 50 * lines * width], width):
        room = width - used - len(space)
        if rows[-1] and _columns(piece) > room:
            rows, used, space = [*rows, ""], 0, ""
        space = space if rows[-1] else ""
        rows[-1] += space + piece
        used += len(space) + _columns(piece)
        if len(rows) > lines:
            last = rows[lines - 1]
            while _columns(last) > width - 1:
                last = last[:-1]
            return "\n".join([*rows[: lines - 1], last + "…"])
    return "\n".join(rows)


def _pieces(text: str, width: int) -> Iterator[tuple[str, str]]:
    """What may stand on a line of its own, with the space before it."""
    for word in text.split():
        size = width if _columns(word) == len(word) else 1
        for start in range(0, len(word), size):
            yield "" if start else " ", word[start : start + size]


def _columns(text: str) -> int:
    """The width of text in columns, of which Chinese characters take two and escaped ones as many as their escapes."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" and _drawn(c) == c else len(_drawn(c)) for c in text)


@cache
def _drawn(character: str) -> str:
    if not character.isprintable():
        return character if character == "\n" else "\ufffd"
    for spelling in (character, unicodedata.normalize("NFKC", character)):  # "，" may be a plain comma
        if all(ord(c) in _glyphs() for c in spelling):
            return spelling
    _say_no_font()
    return character.encode("ascii", "backslashreplace").decode()


@cache
def _families() -> list[str]:
    installed = {font.name for font in fontManager.ttflist}
    return [FONT, *[name for name in CJK_FONTS if name in installed][:1]]


@cache
def _glyphs() -> frozenset[int]:
    """The code points that the fonts have, in all weights that are used."""
    own = (get_font(findfont(FontProperties(family=FONT, weight=weight))) for weight in ("normal", "bold"))
    regular, bold = (frozenset(font.get_charmap()) for font in own)
    others = (frozenset(get_font(findfont(FontProperties(family=name))).get_charmap()) for name in _families()[1:])
    return frozenset().union(regular & bold, *others)


@cache  # that is, once
def _say_no_font() -> None:
    shown = "pictures show some characters as escapes, such as \\u6bcf, because no font that is installed has them"
    print(f"note: {shown}; for Chinese, install one such as Noto Sans CJK", file=sys.stderr)
