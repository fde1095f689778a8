"""What visual counting counts: scenes of shapes, which stand for CLEVR, and of vehicles, which stand for SuperCLEVR.

An item stands in a cell of its own of a 4 x 4 board, so that the number of items is no matter of taste.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

Colour = tuple[int, int, int]

SIZE = 56  # pixels, width and height
CELL = SIZE // 4  # of the board; an item stays in its own
MAX_ITEMS = 7

# The mean pixel is near these, and the embedded image processor is normalised to them.
BACKGROUNDS = ((226, 226, 222), (216, 222, 228), (230, 222, 212))
DARK_BACKGROUNDS = ((176, 196, 160), (186, 182, 176), (160, 184, 204))


@dataclass(frozen=True)
class Looks:
    """What the items of a scene are drawn from."""

    kinds: tuple[str, ...]
    colours: dict[str, Colour]
    radii: tuple[int, ...]  # pixels
    backgrounds: Sequence[Colour] = BACKGROUNDS


SHAPES = Looks(
    kinds=("sphere", "cube", "cone", "cylinder"),
    colours={
        "gray": (95, 95, 95),
        "red": (190, 40, 40),
        "blue": (42, 75, 215),
        "green": (29, 125, 40),
        "brown": (129, 74, 25),
        "purple": (129, 38, 192),
        "cyan": (20, 160, 170),
        "orange": (230, 120, 20),
    },
    radii=(3, 5),
)
VEHICLE_KINDS = ("car", "bus", "plane", "motorbike", "bicycle")
VEHICLE_COLOURS = {
    "yellow": (225, 200, 40),
    "pink": (225, 90, 150),
    "navy": (25, 30, 90),
    "olive": (105, 115, 30),
    "maroon": (110, 15, 45),
    "white": (250, 250, 250),
    "black": (20, 20, 20),
    "teal": (15, 110, 105),
}
VEHICLES = Looks(VEHICLE_KINDS, VEHICLE_COLOURS, radii=(4, 5))
FAR_VEHICLES = Looks(VEHICLE_KINDS, VEHICLE_COLOURS, radii=(4, 5), backgrounds=DARK_BACKGROUNDS)


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
    background: Colour


def draw_lots(rng: random.Random, looks: Looks) -> Scene:
    """A scene of 1 to MAX_ITEMS items."""
    items = []
    for cell in rng.sample(range(16), rng.randint(1, MAX_ITEMS)):
        radius = rng.choice(looks.radii)
        room = CELL // 2 - 1 - radius  # a pixel of ground between any two
        x, y = (CELL * at + CELL // 2 + rng.randint(-room, room) for at in (cell % 4, cell // 4))
        items.append(Item(rng.choice(looks.kinds), rng.choice(list(looks.colours)), radius, x, y))
    return Scene(tuple(items), rng.choice(looks.backgrounds))


def draw_scene(scene: Scene) -> Image.Image:
    image = Image.new("RGB", (SIZE, SIZE), scene.background)
    draw = ImageDraw.Draw(image)
    for item in scene.items:
        if item.kind in SHAPES.kinds:
            _draw_shape(draw, item)
        else:
            _draw_vehicle(draw, item)
    return image


def _draw_shape(draw: ImageDraw.ImageDraw, item: Item) -> None:
    x, y, r, colour = item.x, item.y, item.radius, SHAPES.colours[item.colour]
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


def _draw_vehicle(draw: ImageDraw.ImageDraw, item: Item) -> None:
    x, y, r, colour = item.x, item.y, item.radius, VEHICLE_COLOURS[item.colour]
    dark = tuple(value // 3 for value in colour)
    if item.kind == "car":
        draw.rectangle((x - r, y, x + r, y + r - 1), fill=colour)
        draw.rectangle((x - r // 2, y - r + 1, x + r // 2, y), fill=colour)
        draw.rectangle((x - r + 1, y + r - 1, x - r + 2, y + r), fill=dark)
        draw.rectangle((x + r - 2, y + r - 1, x + r - 1, y + r), fill=dark)
    elif item.kind == "bus":
        draw.rectangle((x - r, y - r + 1, x + r, y + r - 1), fill=colour)
        draw.line((x - r + 1, y - r + 2, x + r - 1, y - r + 2), fill=dark)
        draw.point(((x - r + 1, y + r), (x + r - 1, y + r)), fill=dark)
    elif item.kind == "plane":
        draw.line((x - r, y, x + r, y), fill=colour, width=2)
        draw.polygon(((x, y - r), (x + 1, y - r), (x - 1, y + r), (x - 2, y + r)), fill=colour)
        draw.line((x - r, y - 2, x - r, y + 2), fill=dark)
    elif item.kind == "motorbike":
        for wheel in (x - r + 1, x + r - 1):
            draw.ellipse((wheel - 1, y + r - 3, wheel + 1, y + r - 1), fill=dark)
        draw.polygon(((x - r + 1, y + r - 2), (x, y - r + 1), (x + r - 1, y + r - 2)), fill=colour)
    else:
        for wheel in (x - r + 1, x + r - 1):
            draw.ellipse((wheel - 1, y, wheel + 1, y + 2), outline=dark)
        draw.line((x - r + 1, y + 1, x, y - r + 2, x + r - 1, y + 1), fill=colour, width=2)
