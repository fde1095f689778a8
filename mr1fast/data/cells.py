"""What a single cell means: a question, an answer, choices. What cannot be used is a BadRow."""

from __future__ import annotations

import json
import math
import numbers
import re
from contextlib import suppress
from decimal import Decimal
from typing import Any

from mr1fast.data.example import IMAGE_MARKER
from mr1fast.data.text_files import whole_characters
from mr1fast.rewards import extract_answer

# These stand for an image or a video in a prompt: if they stayed in a question, the processor would look for images
# that do not exist. The others begin and end turns of a chat: the model would see the question end, or another turn.
_IMAGE_MARKERS = (IMAGE_MARKER, "<video>") + tuple(
    f"<|{name}|>" for name in ("image_pad", "video_pad", "vision_start", "vision_end", "vision_pad")
)
_CHAT_MARKERS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
_ANSWER_TAGS = re.compile(r"</?(?:answer|think)>")
_GREATEST_PLAIN = 1e21  # floating-point numbers above it, like those near 0, keep their exponent


class BadRow(ValueError):
    """A row that cannot be used; the message is the reason, short enough to be counted."""


# ---- question and answer --------------------------------------------------------------------------------------------


def question_of(value: Any, notes: list[str], images: int = 0) -> str:
    """The question about so many images; repairs are appended to `notes`.

    Without the markers that a prompt adds itself, except that IMAGE_MARKER stays where the question has it as often as
    there are images and text comes before one of them: see `Example.problem`.
    """
    text = _text(value, "question", notes)
    question = _placed(text, images)
    if question is not None:
        _note_markers(text.replace(IMAGE_MARKER, " "), "question", notes)
        return question
    question = _without_markers(text).strip()
    _note_markers(text, "question", notes)
    if images > 1 and text.count(IMAGE_MARKER) not in (0, images):
        notes.append("images put first, because the question marks another number of them")
    if not question:
        raise BadRow("no question")
    return question


def answer_of(value: Any, notes: list[str]) -> str:
    """The answer alone, without its tags; repairs are appended to `notes`."""
    whole = _text(value, "answer", notes)
    _note_markers(whole, "answer", notes)
    text = _without_markers(whole).strip()
    if not text:
        raise BadRow("no answer")
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


def _placed(question: str, images: int) -> str | None:
    """The question with IMAGE_MARKER in the places of its images; None if it does not say where they stand."""
    if question.count(IMAGE_MARKER) != images:
        return None
    pieces = [_without_markers(piece) for piece in question.split(IMAGE_MARKER)]
    if not any(piece.strip() for piece in pieces[:-1]) or "".join(pieces) != _without_markers(question):
        return None  # they come first, as they do anyway; or a marker falls apart into others
    return IMAGE_MARKER.join(pieces).strip()


def _note_markers(text: str, what: str, notes: list[str]) -> None:
    for markers, name in ((_IMAGE_MARKERS, "image"), (_CHAT_MARKERS, "chat")):
        if any(marker in text for marker in markers):
            notes.append(f"{name} marker removed from the {what}")


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
