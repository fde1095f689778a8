"""What the cells of a row mean: its question, its answer, its image. What cannot be used is a BadRow."""

from __future__ import annotations

import base64
import json
import math
import numbers
import re
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

from mr1fast.data.tables import READ, Table
from mr1fast.data.text_files import whole_characters
from mr1fast.rewards import extract_answer

# These stand for an image or a video in a prompt: if they stayed in a question, the processor would look for images
# that do not exist. The others begin and end turns of a chat: the model would see the question end, or another turn.
_IMAGE_MARKERS = ("<image>", "<video>") + tuple(
    f"<|{name}|>" for name in ("image_pad", "video_pad", "vision_start", "vision_end", "vision_pad")
)
_CHAT_MARKERS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
_ANSWER_TAGS = re.compile(r"</?(?:answer|think)>")
_BASE64 = re.compile(rb"[A-Za-z0-9+/_=\s-]*")
_GREATEST_PLAIN = 1e21  # floating-point numbers above it, like those near 0, keep their exponent


class BadRow(ValueError):
    """A row that cannot be used; the message is the reason, short enough to be counted."""


# ---- question and answer --------------------------------------------------------------------------------------------


def question_of(value: Any, notes: list[str]) -> str:
    """The question, without the markers that a prompt adds itself; repairs are appended to `notes`."""
    question = _text(value, "question", notes)
    if not question:
        raise BadRow("no question")
    return question


def answer_of(value: Any, notes: list[str]) -> str:
    """The answer alone, without its tags; repairs are appended to `notes`."""
    text = _text(value, "answer", notes)
    answer = extract_answer(text)
    if answer is None:
        answer = _ANSWER_TAGS.sub("", text).strip()
        notes.append("answer without tags" if answer == text else "answer with broken tags")
    if not answer:
        raise BadRow("no answer")
    if "\ufffd" in answer:
        raise BadRow("answer has broken characters")  # no answer of a model could equal it
    return answer


def _text(value: Any, what: str, notes: list[str]) -> str:
    """A cell as text: numbers are written out, and a list with one item counts as that item."""
    if isinstance(value, list | tuple) and len(value) == 1:
        notes.append(f"{what} taken out of a list")
    while isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    if value is None or (isinstance(value, list | tuple) and not value):
        raise BadRow(f"no {what}")
    if isinstance(value, numbers.Real | Decimal) and not isinstance(value, bool):
        if value != value:  # NaN
            raise BadRow(f"no {what}")
        if value in (math.inf, -math.inf):
            raise BadRow(f"{what} is not a finite number")
        notes.append(f"{what} is a number, not text")
        return number_text(value)
    if not isinstance(value, str):
        raise BadRow(f"{what} is neither text nor a number")
    text = whole_characters(value)
    if text != value:
        notes.append(f"broken characters in the {what} replaced")
    for markers, name in ((_IMAGE_MARKERS, "image"), (_CHAT_MARKERS, "chat")):
        if any(marker in text for marker in markers):
            notes.append(f"{name} marker removed from the {what}")
    text = _without_markers(text).strip()
    if not text:
        raise BadRow(f"no {what}")
    return text


def number_text(value: Any) -> str:
    """A finite number as people write it: the shortest text that equals it at its own precision, "3" for 3.0.

    For numpy's float32 that is "0.1" and not "0.10000000149011612". Decimals never have an exponent.
    """
    text = str(value)
    number: Any = value if isinstance(value, int | Decimal) else float(value)
    if isinstance(value, Decimal) or (number == int(number) and abs(number) < _GREATEST_PLAIN):
        text = format(Decimal(text), "f")
        text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if value == 0 else text


def _without_markers(text: str) -> str:
    """The text without markers, in one pass; this includes markers that only form when another one is removed."""
    markers = (*_IMAGE_MARKERS, *_CHAT_MARKERS)
    longest = max(map(len, markers))
    kept: list[str] = []  # characters
    for character in text:
        kept.append(character)
        if character == ">":  # every marker ends with it
            end = "".join(kept[-longest:])
            marker = next((marker for marker in markers if end.endswith(marker)), "")
            del kept[len(kept) - len(marker) :]
    return "".join(kept)


def choices_of(value: Any, notes: list[str]) -> tuple[str, ...] | None:
    """The choices, from a list of texts or numbers or from such a list in JSON; None if there are none."""
    if isinstance(value, str) and value:
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    if value is None or value in ("", []):
        return None
    if isinstance(value, list | tuple) and all(isinstance(one, str | numbers.Real) for one in value):
        return tuple(whole_characters(str(one)) for one in value)
    notes.append("choices are not a list, ignored")
    return None


def others_of(table: Table, row: int) -> dict[str, Any]:
    """The cells that no other function here reads, for reward functions; None where the row has none, or has bytes."""
    values = table.rows[row]
    assert isinstance(values, dict)  # or it would have been a BadRow
    others = sorted(table.columns - {*READ})
    return {name: None if _has_bytes(values.get(name)) else values.get(name) for name in others}


def _has_bytes(value: Any) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, bytes) or (isinstance(value, list | tuple) and any(map(_has_bytes, value)))


# ---- image ----------------------------------------------------------------------------------------------------------


def image_of(table: Table, row: int) -> Path | bytes:
    """The image's file, or its content where the row holds that. Raises BadRow; the file need not exist."""
    values = table.rows[row]
    if isinstance(values, str):
        raise BadRow(values)
    image = values.get("image")
    if image is None:
        image = values.get("file_name")  # an image folder's metadata
    if isinstance(image, list) and len(image) == 1:
        image = image[0]
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes):
        return image
    if isinstance(image, list) and image:
        raise BadRow("several images")
    if image is None or image == "" or image == []:
        raise BadRow("no image")
    if not isinstance(image, str):
        raise BadRow("image is neither a path nor image bytes")
    return _located(image, table.folder)


def _located(image: str, folder: Path) -> Path | bytes:
    """The image behind a path, or behind a URL that needs no network."""
    if re.match("data:[^,]*,", image, re.IGNORECASE):
        return _content_of_url(image)
    if re.match("file:", image, re.IGNORECASE):
        # urlsplit cuts off what follows an unescaped ? or #, which no image's name need lack.
        url = urlsplit(image.replace("?", "%3F").replace("#", "%23"))
        if url.netloc not in ("", "localhost"):
            raise BadRow("image is on another machine, not a file")
        return folder / url2pathname(url.path)
    if re.match("[a-z][a-z0-9+.-]*://", image, re.IGNORECASE):
        raise BadRow("image is a web address, not a file")
    return folder / image


def _content_of_url(url: str) -> bytes:
    """The content of `data:[type][;base64],content`. Pure Base64 is decoded even without `;base64`."""
    kind, _, content = url.partition(",")
    data = unquote_to_bytes(content)
    if _BASE64.fullmatch(data):
        letters = re.sub(rb"[\s=]", b"", data).translate(bytes.maketrans(b"-_", b"+/"))
        try:
            return base64.b64decode(letters + b"=" * (-len(letters) % 4), validate=True)
        except ValueError:
            raise BadRow("image is not valid Base64") from None
    if ";base64" in kind.lower():
        raise BadRow("image is not valid Base64")
    return data
