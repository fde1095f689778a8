"""The rows of JSON lines, JSON and CSV files, whatever their encoding and, for CSV, their separator.

They are read here and not by `datasets`, which gives up a whole file at its first broken line.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Collection
from typing import Any

Row = dict[str, Any] | str  # the cells by column, or the reason why the row cannot be read

NOT_AN_OBJECT = "row is not an object with columns"

_MARKS = (  # UTF-32's mark begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # what "surrogateescape" makes of a byte that is not UTF-8
_UTF8 = re.compile("[^\0-\x7f\udc80-\udcff]")  # a character of several bytes
_CHINESE = re.compile(rb"[\xa1-\xf7][\xa1-\xfe]")  # a character of GB 2312; a text in Latin letters has few such pairs
_LONGEST_CELL = 2**31 - 1  # characters; csv's own limit is 128 Ki, and an image may stand in a cell


def read_json(content: bytes) -> list[Row]:
    """A list of objects; an object that holds one such list, under "data" or any other name; or JSON lines."""
    text = _decoded(content)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return read_json_lines(content)  # which are often named .json
    if isinstance(found, dict):
        lists = [value for value in found.values() if isinstance(value, list)]
        found = lists[0] if len(lists) == 1 else [found]
    if not isinstance(found, list):
        found = [found]
    return [row if isinstance(row, dict) else NOT_AN_OBJECT for row in found]


def read_json_lines(content: bytes) -> list[Row]:
    # Not splitlines(), which also cuts at characters that may stand inside a JSON string, such as U+2028.
    return [_json_line(line) for line in re.split(r"\r\n|\r|\n", _decoded(content)) if line.strip()]


def _json_line(line: str) -> Row:
    if _NOT_UTF8.search(line):
        return "line is not UTF-8"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return "line is not JSON"
    return row if isinstance(row, dict) else NOT_AN_OBJECT


def read_csv(content: bytes, columns: Collection[str]) -> tuple[list[Row], str]:
    """The rows, and the encoding if it is neither UTF-8 nor marked, else "".

    The separator is the one that finds most of `columns` in the first line.
    """
    text, encoding = _decoded_csv(content)
    text = text.lstrip("\r\n")
    first_line = text.partition("\n")[0]
    separator = max(",;\t|", key=lambda mark: len(set(columns) & set(_names(first_line.split(mark)))))
    csv.field_size_limit(_LONGEST_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    names: list[str] | None = None
    rows: list[Row] = []
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return rows, encoding
        except csv.Error:
            rows.append("line is not CSV")
            continue
        if names is None:
            names = _names(cells)
        elif len(cells) > len(names):
            rows.append("line has more fields than there are columns")
        elif cells:
            rows.append(dict(zip(names, cells)))


def _names(cells: list[str]) -> list[str]:
    return [cell.strip().strip('"') for cell in cells]


def _decoded(content: bytes) -> str:
    """Decode by the byte order mark, else as UTF-8; a byte that is not UTF-8 becomes a surrogate, U+DC80 to U+DCFF."""
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            return content.decode(encoding, "replace")
    return content.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")


def _decoded_csv(content: bytes) -> tuple[str, str]:
    """The text, and how it was decoded if it is neither UTF-8 nor marked: spreadsheets still save CSV like that."""
    text = _decoded(content)
    if len(_NOT_UTF8.findall(text)) <= len(_UTF8.findall(text)):
        return text, ""  # UTF-8, but for a few broken bytes
    if _CHINESE.sub(b"", content).isascii():
        return content.decode("gb18030", "surrogateescape"), "GB 18030"
    # Latin-1 with letters and quotation marks in place of control characters.
    return content.decode("cp1252", "replace"), "Windows-1252"


def whole_characters(text: str) -> str:
    """Join the halves of UTF-16 surrogate pairs; a half on its own, which no encoding accepts, becomes U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
