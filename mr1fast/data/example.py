"""A problem, and a data set of problems."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from PIL import Image

IMAGE_MARKER = "<image>"  # in a question, the place of an image


@dataclass(frozen=True)
class Example:
    """One problem with its verifiable answer."""

    image: Image.Image | None  # RGB; None for a question in text alone
    # The question, without the prompt suffix. Where it has IMAGE_MARKER as often as there are images, these stand
    # there, in order; else they come before it.
    problem: str
    solution: str  # the answer alone, e.g. "3"
    name: str = ""  # what a reader finds it by: "vc/test/17", or file and row; several may have the same
    choices: tuple[str, ...] | None = None  # what the answers A, B, ... stand for
    columns: Mapping[str, Any] = field(default_factory=dict)  # the row's other cells, without images and bytes
    more_images: tuple[Image.Image, ...] = ()  # RGB, those after the first

    @property
    def images(self) -> tuple[Image.Image, ...]:
        """All images, in the order in which the model is shown them."""
        return self.more_images if self.image is None else (self.image, *self.more_images)

    def reward_columns(self) -> dict[str, Any]:
        """What a reward function is told beside completion and solution, by name."""
        return {**self.columns, "problem": self.problem, "choices": self.choices}


class Examples(Protocol):
    """A data set, as far as training is concerned."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Example: ...
