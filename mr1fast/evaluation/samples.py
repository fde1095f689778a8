"""samples.png: what a model answers to problems of the test split, before and after its training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from mr1fast.data.example import Example
from mr1fast.data.images import thumbnail
from mr1fast.evaluation.drawing import clipped, drawable, drawing
from mr1fast.evaluation.result import Answered

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Mark, colour, meaning, and where the legend has it (inches from the left).
RIGHT, WRONG = ("✓", "#1a7f37", "right", 0.15), ("✗", "#cf222e", "wrong", 0.95)
UNTAGGED = ("(✓)", "#9a6700", "right, but not in answer tags, which counts as wrong", 1.85)
COLUMNS = 4
WIDTH, IMAGE, GAP, HEAD = 3.2, 2.1, 0.08, 0.98  # inches: of a cell; heights of the image, of gaps, of the title
MAX_SIDE = 512  # pixels; larger images are scaled down
MAX_IMAGES = 3  # of a problem


@dataclass(frozen=True)
class BeforeAfter:
    """A problem with its answers before and after training, or after so many steps of it."""

    example: Example
    before: Answered
    after: Answered
    when: str = "after training"


def draw_samples(file: Path, shown: Sequence[BeforeAfter], title: str) -> Path:
    """One cell a problem: images, question, true answer, and both completions with a mark and its colour."""
    cells = [_paragraphs(one) for one in shown]
    # All cells are as high as the cell with the most text needs to be.
    heights = [max(texts[i].text.count("\n") + 1 for texts in cells) * cells[0][i].line for i in range(len(cells[0]))]
    cell = IMAGE + sum(heights) + GAP * (len(heights) + 1)
    columns = min(COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    right = [sum(getattr(one, when).correct for one in shown) for when in ("before", "after")]
    below = f"{len(shown)} problems of the test split, not selected: {right[0]} right before training, {right[1]} after"
    with drawing():
        figure = Figure(figsize=(max(WIDTH * columns, 6.5), cell * rows + HEAD), dpi=110)
        height = figure.get_figheight()
        top, bottom = 1 - HEAD / height, 0.1 / height
        figure.subplots_adjust(left=0.01, right=0.99, top=top, bottom=bottom, wspace=0.05, hspace=0.05)
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for axis in axes:
            axis.set_axis_off()
        for axis, one, texts in zip(axes, shown, cells):
            _draw_cell(axis, one.example, texts, heights, cell)
        # Not as mathematics: a $ is a $.
        head: dict[str, Any] = {"va": "center", "parse_math": False}
        figure.text(0.012, 1 - 0.25 / height, drawable(title), fontsize=13, fontweight="bold", **head)
        figure.text(0.012, 1 - 0.52 / height, below, fontsize=10, **head)
        for mark, colour, meaning, left in (RIGHT, WRONG, UNTAGGED):
            x = left / figure.get_figwidth()
            figure.text(x, 1 - 0.77 / height, f"{mark} {meaning}", color=colour, fontsize=10, **head)
        file.parent.mkdir(parents=True, exist_ok=True)
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


def _paragraphs(one: BeforeAfter) -> list[Text]:
    """What stands below the image, from top to bottom."""
    texts = [
        Text(clipped(one.example.problem, 3, 38)),
        Text(f"true answer: {clipped(one.example.solution, 1, 22)}", size=10, weight="bold"),
    ]
    for when, answered in (("before training", one.before), (one.when, one.after)):
        mark, colour, *_ = RIGHT if answered.correct else UNTAGGED if answered.right_untagged else WRONG
        said = "no answer in tags" if answered.answer is None else clipped(answered.answer, 1, 16)
        texts.append(Text(f"{mark} {when}: {said}", colour, 10, "bold", gap=False))
        texts.append(Text(clipped(answered.completion or "(nothing)", 4, 46), colour, 7.5))
    return texts


def _draw_cell(axis: Axes, example: Example, texts: Sequence[Text], heights: Sequence[float], cell: float) -> None:
    """`cell` and `heights` are the heights of the cell and of its texts in inches."""
    axis.set_xlim(0, 1)
    axis.set_ylim(cell, 0)  # inches from the top
    axis.add_patch(Rectangle((0, 0), 1, 1, fill=False, edgecolor="0.8", transform=axis.transAxes))
    _draw_images(axis, example.images, cell)
    y = IMAGE + GAP
    for text, height in zip(texts, heights):
        style: dict[str, Any] = {"color": text.colour, "fontsize": text.size, "fontweight": text.weight}
        axis.text(0.04, y, drawable(text.text), va="top", linespacing=1.15, clip_on=True, parse_math=False, **style)
        y += height + (GAP if text.gap else 0)


def _draw_images(axis: Axes, images: Sequence[Image.Image], cell: float) -> None:
    """Side by side; of more than there is room for, the first ones."""
    if not images:
        axis.text(0.5, IMAGE / 2, "(text only)", ha="center", color="0.5")
        return
    shown = images[:MAX_IMAGES]
    width = 0.94 / len(shown)
    for number, image in enumerate(shown):
        _draw_image(axis, image, cell, left=0.03 + number * width, width=width)
    if len(images) > len(shown):
        axis.text(0.97, IMAGE - 0.02, f"and {len(images) - len(shown)} more", ha="right", color="0.5", fontsize=7.5)


def _draw_image(axis: Axes, image: Image.Image, cell: float, *, left: float, width: float) -> None:
    shown = thumbnail(image, MAX_SIDE)
    if shown is None:
        axis.text(left + width / 2, IMAGE / 2, "(no image)", ha="center", color="0.5")
        return
    picture = axis.inset_axes((left, 1 - (IMAGE - 0.02) / cell, width, (IMAGE - 0.1) / cell))
    picture.imshow(shown, interpolation="nearest" if max(shown.size) <= 128 else "antialiased")
    picture.set_axis_off()
