"""What flows between the parts of the trainer."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class Example:
    """One problem with its verifiable answer."""

    image: Image.Image | None  # RGB
    problem: str  # the question, without the prompt suffix
    solution: str  # the answer alone, e.g. "3"
    name: str  # for reports: "vc/test/17", or file and row
