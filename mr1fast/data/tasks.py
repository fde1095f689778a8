"""The embedded tasks, drawn on the fly from a seed: visual counting (VC) and geometry reasoning (GR).

They stand for the paper's two data sets (CLEVR counting and GEOQA) at the scale of the embedded model: 56 x 56 pixels,
a short question, one integer as the answer. A drawing is a function of (task, split, index) alone.

- VC: a scene of 1 to 7 items of several kinds, colours and sizes, each somewhere in a cell of its own of a 4 x 4 board.
  Splits differ by seed; every drawing is new.
- GR: a triangle with two of its angles labelled. The splits share no problem: an unordered pair of angles belongs to
  exactly one of them, so that a test accuracy cannot come from remembered answers.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Protocol

from PIL import Image, ImageDraw, ImageFont

from mr1fast.data.example import Example

SPLITS = ("train", "validation", "test")
SIZE = 56  # pixels, width and height

# The mean pixel is near these, and the embedded image processor is normalised to them.
BACKGROUNDS = ((226, 226, 222), (216, 222, 228), (230, 222, 212))
COLOURS = {
    "gray": (95, 95, 95),
    "red": (190, 40, 40),
    "blue": (42, 75, 215),
    "green": (29, 125, 40),
    "brown": (129, 74, 25),
    "purple": (129, 38, 192),
    "cyan": (20, 160, 170),
    "orange": (230, 120, 20),
}


class Task(Protocol):
    """A source of problems, and all that the rest of mr1fast knows of it.

    splits: the number of different problems in each, None where they have no end. recipe: what an option of
    `python -m mr1fast.train` is for the embedded model on this task when nobody sets it.
    """

    name: str
    title: str
    question: str
    splits: ClassVar[dict[str, int | None]]
    recipe: ClassVar[dict[str, Any]]

    def example(self, split: str, index: int) -> Example: ...


def _random(task: str, split: str, index: int) -> random.Random:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    return random.Random(f"{task}/{split}/{index}")  # strings seed through SHA-512: the same on every machine


# ---- visual counting ------------------------------------------------------------------------------------------------

KINDS = ("sphere", "cube", "cone", "cylinder")
RADII = (3, 5)  # pixels
CELL = SIZE // 4  # of the board; an item stays in its own


@dataclass(frozen=True)
class Item:
    kind: str
    colour: str
    radius: int  # pixels
    x: int  # centre, pixels
    y: int


@dataclass(frozen=True)
class Scene:
    items: tuple[Item, ...]
    background: tuple[int, int, int]


class VisualCounting:
    name = "vc"
    title = "visual counting"
    question = "How many items are there in the image?"
    splits: ClassVar[dict[str, int | None]] = dict.fromkeys(SPLITS)
    recipe: ClassVar[dict[str, Any]] = {
        "prompts_per_step": 16,
        "learning_rate": 3e-4,
        "max_steps": 200,
        "max_completion_length": 32,
    }
    max_items = 7

    def scene(self, split: str, index: int) -> Scene:
        rng = _random(self.name, split, index)
        items = []
        for cell in rng.sample(range(16), rng.randint(1, self.max_items)):
            radius = rng.choice(RADII)
            room = CELL // 2 - 1 - radius  # a pixel of ground between any two: the number is no matter of taste
            x, y = (CELL * at + CELL // 2 + rng.randint(-room, room) for at in (cell % 4, cell // 4))
            items.append(Item(rng.choice(KINDS), rng.choice(list(COLOURS)), radius, x, y))
        return Scene(tuple(items), rng.choice(BACKGROUNDS))

    def example(self, split: str, index: int) -> Example:
        scene = self.scene(split, index)
        return Example(draw_scene(scene), self.question, str(len(scene.items)), f"vc/{split}/{index}")


def draw_scene(scene: Scene) -> Image.Image:
    image = Image.new("RGB", (SIZE, SIZE), scene.background)
    draw = ImageDraw.Draw(image)
    for item in scene.items:
        x, y, r, colour = item.x, item.y, item.radius, COLOURS[item.colour]
        light = tuple((value + 255) // 2 for value in colour)
        if item.kind == "sphere":
            draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
            draw.ellipse((x - r // 2, y - r // 2, x - r // 2 + 1, y - r // 2 + 1), fill=light)
        elif item.kind == "cube":
            draw.rectangle((x - r, y - r, x + r, y + r), fill=colour)
            draw.rectangle((x - r, y - r, x + r, y - r + 1), fill=light)
        elif item.kind == "cone":
            draw.polygon(((x, y - r), (x - r, y + r), (x + r, y + r)), fill=colour)
            draw.line((x, y - r, x - r // 2, y + r - 1), fill=light)
        else:
            draw.rectangle((x - r + 1, y - r + 1, x + r - 1, y + r - 1), fill=colour)
            draw.ellipse((x - r + 1, y - r, x + r - 1, y - r + 3), fill=light)
    return image


# ---- geometry reasoning ---------------------------------------------------------------------------------------------

LABELLED = range(16, 92, 2)  # degrees, what the two labelled angles may be
# Where a label's top left corner is, before its jitter: below the left and the right end of the base.
LABEL_SLOTS = ((2, 45), (42, 45))
STROKES = ((20, 20, 20), (30, 30, 110), (110, 20, 20), (10, 80, 40))


@dataclass(frozen=True)
class Triangle:
    angles: tuple[int, int]  # degrees, at the left and the right end of the base
    jitter: tuple[tuple[int, int], tuple[int, int]]  # pixels, of the two labels
    stroke: tuple[int, int, int]
    background: tuple[int, int, int]

    @property
    def third(self) -> int:
        return 180 - sum(self.angles)


@cache
def angle_pairs(split: str) -> tuple[tuple[int, int], ...]:
    """The problems of a split: unordered pairs of even degrees."""
    pairs = [(a, b) for a in LABELLED for b in LABELLED if a <= b and a + b < 180]
    random.Random("gr").shuffle(pairs)
    bounds = {"test": (0, 200), "validation": (200, 280), "train": (280, len(pairs))}
    return tuple(pairs[slice(*bounds[split])])


class GeometryReasoning:
    name = "gr"
    title = "geometry reasoning"
    question = "What is the third angle of the triangle?"
    # In training, a pair of angles comes again and again, in a new drawing each time.
    splits: ClassVar[dict[str, int | None]] = {
        "train": None,
        "validation": len(angle_pairs("validation")),
        "test": len(angle_pairs("test")),
    }
    recipe: ClassVar[dict[str, Any]] = {
        "prompts_per_step": 32,
        "learning_rate": 2e-4,
        "max_steps": 200,
        "max_completion_length": 32,
    }

    def triangle(self, split: str, index: int) -> Triangle:
        rng = _random(self.name, split, index)
        pairs = angle_pairs(split)
        # Evaluation asks each problem once; an index beyond the last one is another drawing of an earlier problem.
        pair = pairs[index % len(pairs)] if split != "train" else rng.choice(pairs)
        angles = pair if rng.random() < 0.5 else pair[::-1]
        left, right = ((rng.randint(-1, 1), rng.randint(-1, 0)) for _ in LABEL_SLOTS)
        return Triangle(angles, (left, right), rng.choice(STROKES), rng.choice(BACKGROUNDS))

    def example(self, split: str, index: int) -> Example:
        triangle = self.triangle(split, index)
        return Example(draw_triangle(triangle), self.question, str(triangle.third), f"gr/{split}/{index}")


def draw_triangle(triangle: Triangle) -> Image.Image:
    """The triangle to scale, standing on its base, a label below each end of it and a question mark above the apex."""
    image = Image.new("RGB", (SIZE, SIZE), triangle.background)
    draw = ImageDraw.Draw(image)
    draw.fontmode = "1"
    font = ImageFont.load_default_imagefont()
    left, right = (math.radians(angle) for angle in triangle.angles)
    aspect = 1 / (1 / math.tan(left) + 1 / math.tan(right))  # height over base
    base = min(SIZE - 8, (SIZE - 24) / aspect)
    x, y = (SIZE - base) / 2, SIZE - 13
    apex = (x + base * aspect / math.tan(left), y - base * aspect)
    draw.polygon(((x, y), (x + base, y), apex), outline=triangle.stroke)
    for (slot_x, slot_y), (dx, dy), angle in zip(LABEL_SLOTS, triangle.jitter, triangle.angles):
        draw.text((slot_x + dx, slot_y + dy), str(angle), fill=triangle.stroke, font=font)
    draw.text((apex[0] - 3, apex[1] - 12), "?", fill=triangle.stroke, font=font)
    return image


# A task is added here, and nowhere else.
TASKS: dict[str, Task] = {task.name: task for task in (VisualCounting(), GeometryReasoning())}
