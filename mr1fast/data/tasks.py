"""The embedded tasks, drawn on the fly from a seed: visual counting (VC) and geometry reasoning (GR).

They stand for the paper's two data sets (CLEVR counting and GEOQA) at the scale of the embedded model: 56 x 56 pixels,
a short question, one integer as the answer. A drawing is a function of (task, split, index) alone.

- VC: a scene of 1 to 7 items of several kinds, colours and sizes. Splits differ by seed; every drawing is new. Two more
  splits are there to test on after training on shapes, as the paper tests on SuperCLEVR after CLEVR: `vehicles` are
  other kinds, colours and sizes on the same grounds, `far` are vehicles on darker, coloured grounds.
- GR: a triangle with two of its angles labelled. The splits share no problem: an unordered pair of angles belongs to
  exactly one of them, so that a test accuracy cannot come from remembered answers; 200 pairs are for testing.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Protocol

from PIL import Image, ImageDraw, ImageFont

from mr1fast.data.example import Example
from mr1fast.data.scenes import BACKGROUNDS, FAR_VEHICLES, SHAPES, SIZE, VEHICLES, Scene, draw_lots, draw_scene
from mr1fast.errors import UserError

SPLITS = ("train", "validation", "test")  # which every task has


class Task(Protocol):
    """A source of problems, and all that the rest of mr1fast knows of it.

    questions: wordings of the one question that the task asks. splits: the number of different problems in each, None
    where they have no end; those of SPLITS, then others to test on. recipe: what an option of `python -m mr1fast.train`
    is for the embedded model on this task when nobody sets it.
    """

    name: str
    title: str
    questions: ClassVar[tuple[str, ...]]
    splits: ClassVar[dict[str, int | None]]
    recipe: ClassVar[dict[str, Any]]

    def example(self, split: str, index: int, *, reworded: bool = False) -> Example:
        """The problem, with its reasoning in the column of that name.

        reworded: ask in any of the wordings, which split and index decide, and not in the first. Raises UserError for
        an unknown split.
        """
        ...


def check_split(task: Task, split: str) -> None:
    if split not in task.splits:
        raise UserError(f"split must be one of {', '.join(task.splits)}, got {split!r}")


def _random(task: Task, split: str, index: int) -> random.Random:
    check_split(task, split)
    return random.Random(f"{task.name}/{split}/{index}")  # strings seed through SHA-512: the same on every machine


def wording(task: Task, split: str, index: int) -> int:
    """Which of the task's questions a reworded problem asks."""
    return random.Random(f"wording/{task.name}/{split}/{index}").randrange(len(task.questions))


def _example(
    task: Task, split: str, index: int, image: Image.Image, reasoning: str, answer: int, reworded: bool
) -> Example:
    question = task.questions[wording(task, split, index) if reworded else 0]
    name = f"{task.name}/{split}/{index}"
    return Example(image, question, str(answer), name, columns={"reasoning": reasoning})


# ---- visual counting ------------------------------------------------------------------------------------------------


class VisualCounting:
    name = "vc"
    title = "visual counting"
    questions: ClassVar[tuple[str, ...]] = ("How many items are there in the image?", "Count the items in the image.")
    splits: ClassVar[dict[str, int | None]] = dict.fromkeys((*SPLITS, "vehicles", "far"))
    recipe: ClassVar[dict[str, Any]] = {
        "prompts_per_step": 16,
        "learning_rate": 3e-4,
        "max_steps": 200,
        "max_completion_length": 32,
    }

    def scene(self, split: str, index: int) -> Scene:
        looks = {"vehicles": VEHICLES, "far": FAR_VEHICLES}.get(split, SHAPES)
        return draw_lots(_random(self, split, index), looks)

    def example(self, split: str, index: int, *, reworded: bool = False) -> Example:
        scene = self.scene(split, index)
        n = len(scene.items)
        return _example(self, split, index, draw_scene(scene), f"{n} items", n, reworded)


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
    questions: ClassVar[tuple[str, ...]] = (
        "What is the third angle of the triangle?",
        "Find the third angle of the triangle.",
    )
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
        rng = _random(self, split, index)
        pairs = angle_pairs(split)
        # Evaluation asks each problem once; an index beyond the last one is another drawing of an earlier problem.
        pair = pairs[index % len(pairs)] if split != "train" else rng.choice(pairs)
        angles = pair if rng.random() < 0.5 else pair[::-1]
        left, right = ((rng.randint(-1, 1), rng.randint(-1, 0)) for _ in LABEL_SLOTS)
        return Triangle(angles, (left, right), rng.choice(STROKES), rng.choice(BACKGROUNDS))

    def example(self, split: str, index: int, *, reworded: bool = False) -> Example:
        triangle = self.triangle(split, index)
        a, b = triangle.angles
        return _example(self, split, index, draw_triangle(triangle), f"{a}+{b}={a + b}", triangle.third, reworded)


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
