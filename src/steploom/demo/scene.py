"""What the built-in model can be asked for: scenes of one or two shapes, their prompts and their pictures.

Lengths are fractions of the canvas side unless a name says pixels; x grows to the right, y grows downwards.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "INVERSE",
    "RELATIONS",
    "RING_HOLE",
    "SHAPES",
    "SIZES",
    "Item",
    "Placed",
    "Scene",
    "arrange",
    "draw",
    "draw_placed",
    "is_held_out",
    "loose_prompt",
    "outline",
    "prompt",
    "random_scene",
    "vocabulary",
]

RGB = tuple[int, int, int]
Point = tuple[float, float]

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "diamond", "star", "heart", "ring")
"""Names of the shapes."""

COLOURS: dict[str, RGB] = {
    "red": (224, 32, 44),
    "orange": (255, 134, 0),
    "yellow": (255, 212, 0),
    "green": (34, 160, 70),
    "cyan": (0, 190, 210),
    "blue": (35, 80, 220),
    "purple": (130, 50, 190),
    "pink": (255, 95, 175),
}
"""Colours of shapes, 8-bit sRGB."""

BACKGROUNDS: dict[str, RGB] = {
    "white": (255, 255, 255),
    "black": (20, 20, 24),
    "gray": (150, 154, 162),
    "yellow": (255, 230, 120),
    "blue": (140, 192, 255),
    "pink": (255, 194, 212),
}
"""Colours of backgrounds, 8-bit sRGB. A shape never bears the name of the colour behind it."""

SIZES: dict[str, float] = {"small": 0.11, "medium": 0.15, "large": 0.195}
"""Radius of a shape of each size."""

RELATIONS: tuple[str, ...] = ("above", "below", "to the left of", "to the right of")
"""Where the first shape of a prompt is, seen from the second."""

INVERSE: dict[str, str] = {
    "above": "below",
    "below": "above",
    "to the left of": "to the right of",
    "to the right of": "to the left of",
}
"""Each relation, read from the other shape."""

_REACH = 1.13  # the farthest any outline reaches from its centre, in radii
_MARGIN = 0.015
RING_HOLE = 0.52
"""Radius of the hole of a ring of radius 1."""
_SUPERSAMPLE = 4


@dataclasses.dataclass(frozen=True)
class Item:
    """One shape of a scene; all three are names from the tables of this module."""

    shape: str
    colour: str
    size: str


@dataclasses.dataclass(frozen=True)
class Scene:
    """One shape on a background, or a first shape in a relation to a second one."""

    first: Item
    background: str
    relation: str | None = None
    second: Item | None = None

    @property
    def items(self) -> tuple[Item, ...]:
        """The shapes of the scene, one or two."""
        return (self.first,) if self.second is None else (self.first, self.second)


@dataclasses.dataclass(frozen=True)
class Placed:
    """An item with its centre and radius."""

    item: Item
    x: float
    y: float
    radius: float


def outline(shape: str) -> list[Point]:
    """Return the outline of a shape of radius 1 about the origin (of a ring, its outer edge)."""
    if shape in ("circle", "ring"):
        return [(math.cos(a), math.sin(a)) for a in np.linspace(0, 2 * math.pi, 64, endpoint=False)]
    if shape == "square":
        return [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)]
    if shape == "triangle":
        return [(0.0, -1.1), (1.08, 0.78), (-1.08, 0.78)]
    if shape == "diamond":
        return [(0.0, -1.12), (0.92, 0.0), (0.0, 1.12), (-0.92, 0.0)]
    if shape == "star":
        reach = [1.13 if k % 2 == 0 else 0.5 for k in range(10)]
        return [(r * math.sin(k * math.pi / 5), 0.06 - r * math.cos(k * math.pi / 5)) for k, r in enumerate(reach)]
    if shape == "heart":
        return [_heart(a) for a in np.linspace(0, 2 * math.pi, 64, endpoint=False)]
    raise ValueError(f"unknown shape {shape!r}; the shapes are {', '.join(SHAPES)}")


def _heart(angle: float) -> Point:
    y = 13 * math.cos(angle) - 5 * math.cos(2 * angle) - 2 * math.cos(3 * angle) - math.cos(4 * angle)
    return (math.sin(angle) ** 3 * 1.06, -(y + 2.4) / 14.2)


def is_held_out(item: Item, relation: str) -> bool:
    """Say whether "this colour of this shape in this relation to anything" is kept out of training.

    One combination of colour, shape and relation in five is: c + 2 s + r divisible by 5, with the positions c, s
    and r of the three in their tables. Every colour, shape, relation and pair of the two first is still seen.
    """
    place = tuple(COLOURS).index(item.colour) + 2 * SHAPES.index(item.shape) + RELATIONS.index(relation)
    return place % 5 == 0


def _trainable(scene: Scene) -> bool:
    if scene.second is None or scene.relation is None:
        return True
    second_too = is_held_out(scene.second, INVERSE[scene.relation])
    return not (is_held_out(scene.first, scene.relation) or second_too)


def _random_item(rng: np.random.Generator, background: str) -> Item:
    colours = [name for name in COLOURS if name != background]
    return Item(str(rng.choice(SHAPES)), str(rng.choice(colours)), str(rng.choice(tuple(SIZES))))


def random_scene(rng: np.random.Generator, *, held_out: bool = False, pairs: float = 0.75) -> Scene:
    """Draw a scene at random: for training, or (``held_out``) one of two shapes that training never shows.

    A training scene has no held-out combination, read from either of its shapes; a held-out scene has one as its
    first shape. ``pairs`` is the share of two-shape scenes among training scenes.
    """
    while True:
        background = str(rng.choice(tuple(BACKGROUNDS)))
        first = _random_item(rng, background)
        if not held_out and rng.random() >= pairs:
            return Scene(first, background)
        second = _random_item(rng, background)
        relation = str(rng.choice(RELATIONS))
        scene = Scene(first, background, relation, second)
        distinct = (first.shape, first.colour) != (second.shape, second.colour)
        if distinct and (is_held_out(first, relation) if held_out else _trainable(scene)):
            return scene


def prompt(scene: Scene) -> str:
    """Return the whole prompt of a scene, such as "a large red circle above a small blue square on a ..."."""
    words = [f"a {item.size} {item.colour} {item.shape}" for item in scene.items]
    text = f" {scene.relation} ".join(words)
    return f"{text} on a {scene.background} background"


def loose_prompt(scene: Scene, rng: np.random.Generator) -> str:
    """Return a prompt of a scene that may leave out sizes, a colour, the articles or the background."""
    named: list[str] = []
    for item in scene.items:
        size = "" if rng.random() < 0.25 else f"{item.size} "
        colour = "" if rng.random() < 0.03 else f"{item.colour} "
        named.append(f"a {size}{colour}{item.shape}")
    relation = scene.relation or ""
    if relation.startswith("to the") and rng.random() < 0.25:
        relation = relation.removeprefix("to the ")
    text = f" {relation} ".join(named)
    if rng.random() >= 0.12:
        text += f" on a {scene.background} background"
    if rng.random() < 0.05:
        text = text.removeprefix("a ").replace(" a ", " ")
    return text


def vocabulary() -> list[str]:
    """Return every word of the grammar once, sorted."""
    words = {"a", "on", "background", *SHAPES, *COLOURS, *BACKGROUNDS, *SIZES}
    for relation in RELATIONS:
        words.update(relation.split())
    return sorted(words)


def arrange(scene: Scene, rng: np.random.Generator) -> list[Placed]:
    """Give every item of a scene a radius and a centre at random, in keeping with the relation."""
    radii = [SIZES[item.size] * rng.uniform(0.96, 1.04) for item in scene.items]
    if scene.second is None:
        reach = radii[0] * _REACH + _MARGIN
        spread = min(0.5 - reach, 0.2)
        x, y = 0.5 + rng.uniform(-spread, spread, 2)
        return [Placed(scene.first, float(x), float(y), radii[0])]
    reaches = [r * _REACH for r in radii]
    room = 1 - 2 * _MARGIN - 2 * sum(reaches)
    gap = rng.uniform(0.5, 1.0) * min(max(room, 0.0), 0.16)
    slack = (room - gap) * rng.uniform(0.15, 0.85)
    along = [_MARGIN + slack + reaches[0], 1 - _MARGIN - (room - gap - slack) - reaches[1]]
    across = [0.5 + rng.uniform(-1, 1) * min(0.1, 0.5 - _MARGIN - r) for r in reaches]
    if scene.relation in ("below", "to the right of"):
        along = [1 - a for a in along]
    upright = scene.relation in ("above", "below")
    centres = [(c, a) if upright else (a, c) for a, c in zip(along, across, strict=True)]
    return [Placed(i, c[0], c[1], r) for i, c, r in zip(scene.items, centres, radii, strict=True)]


def draw_placed(placed: list[Placed], background: str, pixels: int = 64) -> NDArray[np.uint8]:
    """Draw placed items, anti-aliased, as 8-bit sRGB of shape (pixels, pixels, 3)."""
    side = pixels * _SUPERSAMPLE
    behind = BACKGROUNDS[background]
    image = Image.new("RGB", (side, side), behind)
    pen = ImageDraw.Draw(image)
    for one in placed:
        points = outline(one.item.shape)
        rings = [(one.radius, COLOURS[one.item.colour])]
        if one.item.shape == "ring":
            rings.append((one.radius * RING_HOLE, behind))
        for radius, fill in rings:
            pen.polygon([((one.x + radius * x) * side, (one.y + radius * y) * side) for x, y in points], fill=fill)
    return np.asarray(image.reduce(_SUPERSAMPLE), dtype=np.uint8)


def draw(scene: Scene, rng: np.random.Generator, pixels: int = 64) -> NDArray[np.uint8]:
    """Draw a scene, its items placed at random, as 8-bit sRGB of shape (pixels, pixels, 3)."""
    return draw_placed(arrange(scene, rng), scene.background, pixels)
