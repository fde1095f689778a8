"""A question and its answer in a chat, as ShareGPT (`conversations`) and OpenAI (`messages`) write it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from mr1fast.data.cells import BadRow
from mr1fast.data.columns import first_filled, is_empty
from mr1fast.data.example import IMAGE_MARKER

_USER = ("user", "human")
_ASSISTANT = ("assistant", "gpt")
_IMAGES = ("image", "image_url")  # types of a part


@dataclass(frozen=True)
class Chat:
    question: str  # IMAGE_MARKER stands for an image
    answer: str | None  # None: there is no turn of the assistant
    images: list[Any]  # those that stand in the question itself, and not in a column
    left_out: list[str]  # what else there was, as notes


def chat_of(value: Any) -> Chat | None:
    """The first question of a chat and the answer to it; None if the value is no chat. Raises BadRow.

    A chat is a list, or a list in JSON, of turns {"from": ..., "value": ...} or {"role": ..., "content": ...}; content
    is a text, or a list of parts whose type is text, image or image_url.
    """
    turns = _turns_of(value)
    if turns is None:
        return None
    said = [(str(first_filled(turn, ("role", "from"))).lower(), _content(turn)) for turn in turns]
    asked = next((i for i, (role, _) in enumerate(said) if role in _USER), None)
    if asked is None:
        raise BadRow("chat has no turn of a user")
    answered = said[asked + 1 : asked + 2]
    question, images = _text_and_images(said[asked][1])
    answer = _text_and_images(answered[0][1])[0] if answered and answered[0][0] in _ASSISTANT else None
    left_out = []
    if asked:
        left_out.append("turns before a chat's question left out")
    if len(said) > asked + 2:
        left_out.append("turns after a chat's first answer left out")
    return Chat(question, answer, images, left_out)


def _turns_of(value: Any) -> Sequence[Mapping[str, Any]] | None:
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    if is_empty(value) or not isinstance(value, list | tuple):
        return None
    return value if all(isinstance(turn, dict) and {"role", "from"} & {*turn} for turn in value) else None


def _content(turn: Mapping[str, Any]) -> Any:
    return first_filled(turn, ("content", "value"))


def _text_and_images(content: Any) -> tuple[str, list[Any]]:
    texts, images = [], []
    for part in content if isinstance(content, list | tuple) else [content]:
        if isinstance(part, dict) and (part.get("type") in _IMAGES or not is_empty(part.get("image"))):
            texts.append(IMAGE_MARKER)
            image = first_filled(part, (*_IMAGES, "url", "path"))
            images += [] if image is None else [image]
        elif isinstance(part, dict) and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(part, str):
            texts.append(part)
        elif part is not None:
            raise BadRow("chat has a part that is neither text nor an image")
    return "".join(texts), images
