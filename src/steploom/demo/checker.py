"""Reads shapes, colours, sizes, the background and the relation back out of a picture, from its pixels alone."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
from numpy.typing import NDArray

from steploom.demo import scene

__all__ = ["UNKNOWN", "Found", "Reading", "Verdict", "check", "read"]

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

_BACKGROUND_LIMIT = 30.0  # farthest (Euclidean, of 8-bit sRGB) that a background may be from its palette colour
_COLOUR_LIMIT = 75.0  # the same for the colour of a shape
_SEEN = 55.0  # a pixel this far from the background belongs to a shape
_LEAST_AREA = 0.006  # smaller specks, as a share of the picture, are no shapes
_MUD = 0.004  # nor may they cover more than this
_LEAST_FIT = 0.75  # intersection over union with the nearest shape

UNKNOWN = "unknown"
"""The shape of something that is like none of the shapes."""


@dataclasses.dataclass(frozen=True)
class Found:
    """One shape found in a picture; centre and radius are fractions of the side, fit is 0..1."""

    item: scene.Item
    x: float
    y: float
    radius: float
    fit: float


@dataclasses.dataclass(frozen=True)
class Reading:
    """All that was found in a picture; ``background`` is None and ``clean`` false where it is not of the palette."""

    background: str | None
    found: tuple[Found, ...]
    clean: bool


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Which attributes of a wanted scene a picture has."""

    background: bool
    shape: bool
    colour: bool
    size: bool
    relation: bool

    @property
    def content(self) -> bool:
        """Whether every shape, every colour and the background are right."""
        return self.background and self.shape and self.colour

    @property
    def everything(self) -> bool:
        """Whether all attributes are right."""
        return self.content and self.size and self.relation


def read(picture: NDArray[np.uint8]) -> Reading:
    """Read a picture of shape (side, side, 3), 8-bit sRGB."""
    pixels = picture.astype(np.float64)
    side = pixels.shape[0]
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    behind: Floats = np.median(edge, axis=0)
    background = _nearest(behind, scene.BACKGROUNDS, _BACKGROUND_LIMIT)
    found: list[Found] = []
    specks = 0
    for mask in _blobs(np.linalg.norm(pixels - behind, axis=2) > _SEEN):
        for part in _split_by_colour(pixels, mask):
            one = _identify(pixels, part, behind) if part.sum() >= _LEAST_AREA * side * side else None
            if one is None:
                specks += int(part.sum())
            else:
                found.append(one)
    return Reading(background, tuple(found), background is not None and specks <= _MUD * side * side)


def check(picture: NDArray[np.uint8], wanted: scene.Scene) -> Verdict:
    """Say which attributes of ``wanted`` a picture of shape (side, side, 3), 8-bit sRGB, has."""
    reading = read(picture)
    background = reading.clean and reading.background == wanted.background
    if len(reading.found) != len(wanted.items):
        return Verdict(background, False, False, False, False)
    orders = [reading.found, reading.found[::-1]][: len(wanted.items)]
    return max((_compare(order, wanted, background) for order in orders), key=_score)


def _score(verdict: Verdict) -> tuple[int, bool]:
    return sum(dataclasses.astuple(verdict)[1:4]), verdict.relation


def _compare(found: tuple[Found, ...], wanted: scene.Scene, background: bool) -> Verdict:
    pairs = list(zip((one.item for one in found), wanted.items, strict=True))
    return Verdict(
        background=background,
        shape=all(a.shape == b.shape for a, b in pairs),
        colour=all(a.colour == b.colour for a, b in pairs),
        size=all(a.size == b.size for a, b in pairs),
        relation=wanted.relation is None or _relation(found[0], found[1]) == wanted.relation,
    )


def _relation(first: Found, second: Found) -> str | None:
    across, down = first.x - second.x, first.y - second.y
    if max(abs(across), abs(down)) < 1.3 * min(abs(across), abs(down)):
        return None
    if abs(down) > abs(across):
        return "above" if down < 0 else "below"
    return "to the left of" if across < 0 else "to the right of"


def _nearest(colour: Floats, palette: dict[str, scene.RGB], limit: float) -> str | None:
    away = {name: float(np.linalg.norm(colour - np.array(value))) for name, value in palette.items()}
    best = min(away, key=lambda name: away[name])
    return best if away[best] <= limit else None


def _blobs(mask: Bools) -> list[Bools]:
    """Return the connected parts of a mask (height, width), neighbours across corners included."""
    left = mask.copy()
    blobs: list[Bools] = []
    while left.any():
        blob = np.zeros_like(mask)
        start = np.unravel_index(int(np.argmax(left)), left.shape)
        blob[start] = True
        size = 0
        while size != (size := int(blob.sum())):
            blob = _grown(blob) & left
        left &= ~blob
        blobs.append(blob)
    return blobs


def _grown(mask: Bools) -> Bools:
    padded = np.pad(mask, 1)
    rows = padded[:-2] | padded[1:-1] | padded[2:]
    return rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]


def _core(mask: Bools) -> Bools:
    core = mask & ~_grown(~mask)
    return core if core.any() else mask


def _labels(pixels: Floats) -> NDArray[np.intp]:
    palette = np.array(list(scene.COLOURS.values()), dtype=np.float64)
    return np.argmin(np.linalg.norm(pixels[..., None, :] - palette, axis=-1), axis=-1)


def _split_by_colour(pixels: Floats, mask: Bools) -> list[Bools]:
    """Split a blob (height, width) of two shapes that touch, if its inside has two colours."""
    labels = _labels(pixels)
    counts = np.bincount(labels[_core(mask)], minlength=len(scene.COLOURS))
    major = np.flatnonzero(counts >= 0.2 * counts.sum())
    if len(major) < 2:
        return [mask]
    palette = np.array(list(scene.COLOURS.values()), dtype=np.float64)[major]
    nearest = np.argmin(np.linalg.norm(pixels[..., None, :] - palette, axis=-1), axis=-1)
    return [mask & (nearest == place) for place in range(len(major))]


def _identify(pixels: Floats, mask: Bools, behind: Floats) -> Found | None:
    side = pixels.shape[0]
    inside = pixels[_core(mask)]
    depth = np.linalg.norm(inside - behind, axis=1)
    colour: Floats = np.median(inside[depth >= np.median(depth)], axis=0)
    name = _nearest(colour, scene.COLOURS, _COLOUR_LIMIT)
    if name is None:
        return None
    step = colour - behind
    cover: Floats = np.clip(((pixels - behind) @ step) / (step @ step), 0, 1) * _grown(mask)
    area = float(cover.sum())
    places = np.arange(side, dtype=np.float64) + 0.5
    x, y = float(cover.sum(axis=0) @ places) / area, float(cover.sum(axis=1) @ places) / area
    fits = {shape: _fit(cover, shape, x, y, area) for shape in scene.SHAPES}
    shape = max(fits, key=lambda one: fits[one])
    radius = math.sqrt(area / _unit(shape)[1]) / side
    size = min(scene.SIZES, key=lambda one: abs(math.log(radius / scene.SIZES[one])))
    seen = shape if fits[shape] >= _LEAST_FIT else UNKNOWN
    return Found(scene.Item(seen, name, size), x / side, y / side, radius, fits[shape])


_GRID = 112  # samples along the side of the square -1.2..1.2 in which a unit shape is drawn


@functools.cache
def _unit(shape: str) -> tuple[Bools, float, float]:
    """Return a unit shape as samples (_GRID, _GRID) of -1.2..1.2, its area, and how low its centroid is."""
    places = (np.arange(_GRID) + 0.5) / _GRID * 2.4 - 1.2
    x, y = np.meshgrid(places, places)
    mask = _inside(scene.outline(shape), x, y)
    if shape == "ring":
        mask &= x * x + y * y > scene.RING_HOLE**2
    return mask, float(mask.mean()) * 2.4**2, float(y[mask].mean())


def _inside(points: list[scene.Point], x: Floats, y: Floats) -> Bools:
    inside = np.zeros(x.shape, dtype=np.bool_)
    for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1], strict=True):
        if y0 != y1:
            crosses = (y0 > y) != (y1 > y)
            inside ^= crosses & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
    return inside


def _fit(cover: Floats, shape: str, x: float, y: float, area: float) -> float:
    """Return the overlap of a cover map (side, side), 0..1, with a shape of that area and centroid, in pixels."""
    mask, unit_area, low = _unit(shape)
    radius = math.sqrt(area / unit_area)
    places = (np.arange(_GRID) + 0.5) / _GRID * 2.4 - 1.2
    side = cover.shape[0]
    columns = np.clip(np.floor(x + radius * places).astype(np.intp), 0, side - 1)
    rows = np.clip(np.floor(y + radius * (places - low)).astype(np.intp), 0, side - 1)
    spots = (rows[:, None] * side + columns[None, :])[mask]
    drawn = np.bincount(spots, minlength=side * side).reshape(cover.shape) * (2.4 * radius / _GRID) ** 2
    drawn = np.minimum(drawn, 1)
    return float(np.minimum(drawn, cover).sum() / np.maximum(drawn, cover).sum())
