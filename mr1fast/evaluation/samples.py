"""samples.png: what a model answers to problems of the test split, before and after its training."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mr1fast.data.example import Example
from mr1fast.evaluation.evaluate import evaluate
from mr1fast.evaluation.result import Sample

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from mr1fast.model.policy import Policy

RIGHT, WRONG = "#1a7f37", "#cf222e"
COLUMNS = 4
WIDTH, IMAGE, GAP, HEAD = 3.2, 2.1, 0.08, 0.75  # inches: of a cell; heights of the image, of gaps, of the title
MAX_SIDE = 512  # pixels; larger images are scaled down


@dataclass(frozen=True)
class Shown:
    """A problem and the two greedy completions."""

    example: Example
    before: Sample
    after: Sample


def before_and_after(
    base: Policy, trained: Policy, examples: Sequence[Example], *, max_completion_length: int
) -> list[Shown]:
    """Let both answer greedily, in at most `max_completion_length` tokens."""
    before, after = (
        evaluate(policy, examples, max_completion_length=max_completion_length, sampled=0).samples
        for policy in (base, trained)
    )
    return [Shown(*row) for row in zip(examples, before, after)]


def draw_samples(file: Path, shown: Sequence[Shown], title: str) -> Path:
    """One cell a problem: image, question, true answer, and both completions, green where right and red where wrong."""
    cells = [_paragraphs(one) for one in shown]
    # All cells are as high as the one with most text needs.
    heights = [max(texts[i].text.count("\n") + 1 for texts in cells) * cells[0][i].line for i in range(len(cells[0]))]
    cell = IMAGE + sum(heights) + GAP * (len(heights) + 1)
    columns = min(COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(max(WIDTH * columns, 6.5), cell * rows + HEAD), dpi=110)
    height = figure.get_figheight()
    figure.subplots_adjust(left=0.01, right=0.99, top=1 - HEAD / height, bottom=0.1 / height, wspace=0.05, hspace=0.05)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.set_axis_off()
    for axis, one, texts in zip(axes, shown, cells):
        axis.set_xlim(0, 1)
        axis.set_ylim(cell, 0)  # inches from the top
        axis.add_patch(Rectangle((0, 0), 1, 1, fill=False, edgecolor="0.8", transform=axis.transAxes))
        _draw_image(axis, one.example, cell)
        y = IMAGE + GAP
        for text, room in zip(texts, heights):
            # Not as mathematics: a $ in a question is a $.
            style: dict[str, Any] = {
                "color": text.colour,
                "fontsize": text.size,
                "fontweight": text.weight,
                "parse_math": False,
            }
            axis.text(0.04, y, text.text, va="top", linespacing=1.15, **style)
            y += room + (GAP if text.gap else 0)
    right = [sum(getattr(one, when).correct for one in shown) for when in ("before", "after")]
    below = f"{len(shown)} problems of the test split, not selected: {right[0]} right before training, {right[1]} after"
    figure.text(0.012, 1 - 0.25 / height, title, fontsize=13, fontweight="bold", va="center", parse_math=False)
    figure.text(0.012, 1 - 0.52 / height, below, fontsize=10, va="center")
    file.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a box for it is good enough
        figure.savefig(file)
    return file


@dataclass(frozen=True)
class Text:
    text: str
    colour: str = "black"
    size: float = 9  # points
    weight: str = "normal"
    gap: bool = True  # below it

    @property
    def line(self) -> float:
        """Height of a line in inches."""
        return self.size * 1.3 / 72


def _paragraphs(one: Shown) -> list[Text]:
    """What stands below the image, from top to bottom."""
    texts = [
        Text(clipped(one.example.problem, 3, 38)),
        Text(f"true answer: {clipped(one.example.solution, 1, 22)}", size=10, weight="bold"),
    ]
    for when, sample in (("before", one.before), ("after", one.after)):
        mark, colour = ("✓", RIGHT) if sample.correct else ("✗", WRONG)
        said = "no answer" if sample.answer is None else clipped(sample.answer, 1, 16)
        texts.append(Text(f"{mark} {when} training: {said}", colour, 10, "bold", gap=False))
        texts.append(Text(clipped(sample.completion or "(nothing)", 4, 46), colour, 7.5))
    return texts


def _draw_image(axis: Axes, example: Example, cell: float) -> None:
    if example.image is None:
        return
    image = example.image.copy()
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    picture = axis.inset_axes((0.03, 1 - (IMAGE - 0.02) / cell, 0.94, (IMAGE - 0.1) / cell))
    picture.imshow(image, interpolation="nearest" if max(image.size) <= 128 else "antialiased")
    picture.set_axis_off()


def clipped(text: str, lines: int, width: int) -> str:
    """At most so many lines of so many characters, and a sign that there was more."""
    wrapped = textwrap.wrap(text, width, break_on_hyphens=False) or [""]
    if len(wrapped) > lines:
        wrapped = [*wrapped[: lines - 1], wrapped[lines - 1][: width - 1] + "…"]
    return "\n".join(wrapped)
