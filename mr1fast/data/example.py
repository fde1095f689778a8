"""A problem, and a data set of problems."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from PIL import Image


@dataclass(frozen=True)
class Example:
    """One problem with its verifiable answer."""

    image: Image.Image | None  # RGB
    problem: str  # the question, without the prompt suffix
    solution: str  # the answer alone, e.g. "3"
    name: str = ""  # what a reader finds it by: "vc/test/17", or file and row; several may have the same
    choices: tuple[str, ...] | None = None  # what the answers A, B, ... stand for
    columns: Mapping[str, Any] = field(default_factory=dict)  # the row's other cells, without images and bytes

    def reward_columns(self) -> dict[str, Any]:
        """What a reward function is told beside completion and solution, by name."""
        return {**self.columns, "problem": self.problem, "choices": self.choices}


class Examples(Protocol):
    """A data set, as far as training is concerned."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Example: ...
