"""What a tick costs: seconds by shape and rows."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from steploom.cli.benches.workloads import Arrival

RESULTS = Path(__file__).resolve().parents[1] / "results"
COLUMNS = ("width", "height", "rows", "seconds")

Shape = tuple[int, int]
"""Width and height in pixels."""


class CostError(ValueError):
    """A cost table cannot be read, or does not say what was asked; the message names the mend."""


@dataclasses.dataclass(frozen=True)
class ShapeCosts:
    """Of one shape.

    Attributes:
        ticks: Rows and seconds of a tick, ascending by rows.
        encode_s: What the tick in which a request joins takes longer.
        decode_s: What the tick in which it ends takes longer, for each of its images.
    """

    ticks: tuple[tuple[int, float], ...]
    encode_s: float = 0.0
    decode_s: float = 0.0

    def tick_s(self, rows: int) -> float:
        """Seconds of a tick: linear between what is known, beyond it by the last slope (not below 0).

        Fewer rows than the fewest known take as long as these; with one known number of rows it is proportional.
        """
        points = self.ticks
        if rows <= points[0][0]:
            return points[0][1]
        if len(points) == 1:
            return points[0][1] * rows / points[0][0]
        place = next((i for i, (most, _) in enumerate(points) if rows <= most), len(points) - 1)
        (fewer, less), (more, longer) = points[place - 1], points[place]
        slope = (longer - less) / (more - fewer)
        return longer + max(slope, 0.0) * (rows - more) if rows > more else less + slope * (rows - fewer)


class CostTable:
    """Seconds of ticks on one model and device.

    Args:
        name: What it is called in tables.
        shapes: Costs of each shape.
        rows_per_image: Rows that an image brings to a tick: 2 under guidance.
    """

    def __init__(self, name: str, shapes: Mapping[Shape, ShapeCosts], rows_per_image: int = 2) -> None:
        self.name = name
        self.shapes = dict(shapes)
        self.rows_per_image = rows_per_image
        self._seconds: dict[tuple[Shape, int], float] = {}

    def of(self, shape: Shape) -> ShapeCosts:
        """The costs of a shape.

        Raises:
            CostError: They are not known.
        """
        costs = self.shapes.get(shape)
        if costs is None:
            known = ", ".join(named(one) for one in self.shapes)
            raise CostError(f"costs {self.name!r}: nothing is known of {named(shape)}; ask for one of {known}")
        return costs

    def tick_s(self, shape: Shape, rows: int) -> float:
        """Seconds of a tick of ``rows`` rows, without encoding and decoding."""
        seconds = self._seconds.get((shape, rows))
        if seconds is None:
            seconds = self._seconds[shape, rows] = self.of(shape).tick_s(rows)
        return seconds

    def standalone_s(self, arrival: Arrival) -> float:
        """Seconds of a request that has the device to itself."""
        shape = (arrival.width, arrival.height)
        costs, step_s = self.of(shape), self.tick_s(shape, arrival.images * self.rows_per_image)
        return costs.encode_s + arrival.steps * step_s + arrival.images * costs.decode_s

    def as_json(self) -> dict[str, Any]:
        """What :func:`read` takes."""
        shapes = {
            named(shape): {
                "encode_s": costs.encode_s,
                "decode_s": costs.decode_s,
                "ticks": {str(rows): seconds for rows, seconds in costs.ticks},
            }
            for shape, costs in self.shapes.items()
        }
        return {"name": self.name, "rows_per_image": self.rows_per_image, "shapes": shapes}


def named(shape: Shape) -> str:
    """``512x512``."""
    return f"{shape[0]}x{shape[1]}"


def load(name: str) -> CostTable:
    """The table that is built in under this name, or of a file, JSON or CSV.

    Raises:
        CostError: There is none, or it cannot be understood.
    """
    if name == "h200":
        return h200()
    return read(RESULTS / "costs-demo-cpu.json" if name == "demo-cpu" else Path(name))


def read(path: Path) -> CostTable:
    """A table of a file.

    JSON: ``{"rows_per_image": 2, "shapes": {"512x512": {"ticks": {"2": 0.167, "8": 0.24}, "encode_s": 0.03,
    "decode_s": 0.05}}}``; other keys are notes. CSV: columns ``width, height, rows, seconds``, and ``encode_s``,
    ``decode_s``, ``rows_per_image`` if it has them, where the last row of a shape (of the file) counts.

    Raises:
        CostError: It cannot be read or understood.
    """
    try:
        text = path.read_text()
        table = _of_csv(path, text.splitlines()) if path.suffix.lower() == ".csv" else _of_json(path, json.loads(text))
    except OSError as error:
        raise CostError(f"costs {str(path)!r}: {error.strerror}; give h200, demo-cpu, or a JSON or CSV file") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, CostError):
            raise
        raise CostError(f"costs {str(path)!r}: not a cost table ({error!r}); see {read.__module__}.read") from None
    if not table.shapes:
        raise CostError(f"costs {str(path)!r}: it has no shapes")
    return table


def _of_json(path: Path, record: Mapping[str, Any]) -> CostTable:
    shapes: dict[Shape, ShapeCosts] = {}
    for name, costs in record["shapes"].items():
        width, height = (int(side) for side in name.split("x"))
        ticks = [(int(rows), float(seconds)) for rows, seconds in costs["ticks"].items()]
        shapes[width, height] = _checked(path, name, ticks, costs.get("encode_s", 0.0), costs.get("decode_s", 0.0))
    return CostTable(record.get("name", path.stem), shapes, int(record.get("rows_per_image", 1)))


def _of_csv(path: Path, lines: Iterable[str]) -> CostTable:
    ticks: dict[Shape, list[tuple[int, float]]] = {}
    extra: dict[Shape, tuple[float, float]] = {}
    rows_per_image = 1
    for entry in csv.DictReader(lines):
        shape = (int(entry["width"]), int(entry["height"]))
        ticks.setdefault(shape, []).append((int(entry["rows"]), float(entry["seconds"])))
        extra[shape] = (float(entry.get("encode_s") or 0.0), float(entry.get("decode_s") or 0.0))
        rows_per_image = int(entry.get("rows_per_image") or rows_per_image)
    shapes = {shape: _checked(path, named(shape), known, *extra[shape]) for shape, known in ticks.items()}
    return CostTable(path.stem, shapes, rows_per_image)


def _checked(path: Path, name: str, ticks: Sequence[tuple[int, float]], encode_s: float, decode_s: float) -> ShapeCosts:
    numbers = [seconds for _, seconds in ticks]
    if not ticks or not all(math.isfinite(one) and one > 0 for one in numbers) or min(rows for rows, _ in ticks) < 1:
        raise CostError(f"costs {str(path)!r}, {name}: ticks must have rows of at least 1 and seconds above 0")
    if len(dict(ticks)) < len(ticks) or not (encode_s >= 0 and decode_s >= 0):
        raise CostError(f"costs {str(path)!r}, {name}: rows must differ, encode_s and decode_s must not be negative")
    return ShapeCosts(tuple(sorted(ticks)), float(encode_s), float(decode_s))


H200_SIZES = (256, 384, 512, 640, 768, 896, 1024, 1280, 1536, 2048)
H200_IMAGES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
MEASURED = ShapeCosts(((1, 0.167), (4, 0.240), (16, 0.832)))
"""Qwen-Image at 512x512 on an H200: seconds of a step of 1, 4 and 16 requests (design, section 9)."""
LARGE_GAIN = 1.02
"""At 1024x1024 the same two rows in one forward take that much less than one after the other (likewise)."""


def h200() -> CostTable:
    """Qwen-Image on an H200, from the four figures of the design's section 9. What is measured, and what is fitted:

    - 512x512 is measured at 1, 4 and 16 requests, which :class:`ShapeCosts` interpolates.
    - An image of ``t`` image tokens (one for 16x16 pixels) does the work of ``w(t) = t / 1024 * f(t) / f(1024)``
      images of 512x512, with the forward's operations per token ``f(t) = 20e9 + 4 * 60 * 3072 * (t + 128)``: twice the
      10e9 weights that a token meets, and attention over it and 128 tokens of text in 60 blocks of width 3072. So
      w is 2.35 for 768x768, 4.43 for 1024x1024, 11.6 for 1536x1536.
    - Below 1024x1024 ``n`` images take as long as ``n * t / 1024`` images of 512x512, as measured there, times the
      growth of attention ``f(t) / f(1024)``; at least as long as one 512x512, since reading the weights takes that.
    - At 1024x1024 one image takes as long as that says, two 1.02 times less than twice as long (measured), and each
      further one what the second has added. Above, everything is that of 1024x1024 times ``w(t) / w(4096)``.
    - Encoding takes 0.03 s for a request, decoding 0.05 s for 512x512, in proportion to pixels. Both are assumed.
    - A request is under guidance: 2 rows an image.
    """
    return CostTable("h200", {(size, size): _qwen_image(size * size) for size in H200_SIZES})


def _operations(tokens: float) -> float:
    return 20e9 + 4 * 60 * 3072 * (tokens + 128)


def _qwen_image(pixels: int) -> ShapeCosts:
    tokens = pixels / 256
    attention = _operations(tokens) / _operations(1024)
    if tokens < 4096:
        floor = MEASURED.tick_s(1)
        ticks = [(n, max(_interpolated(n * tokens / 1024) * attention, floor)) for n in H200_IMAGES]
    else:
        growth = tokens / 4096 * _operations(tokens) / _operations(4096)
        alone = MEASURED.tick_s(4) * _operations(4096) / _operations(1024) * growth
        ticks = [(n, alone if n == 1 else alone * (1 + (n - 1) * (2 / LARGE_GAIN - 1))) for n in H200_IMAGES]
    decode_s = 0.05 * tokens / 1024
    return ShapeCosts(tuple((2 * n, round(seconds, 6)) for n, seconds in ticks), encode_s=0.03, decode_s=decode_s)


def _interpolated(images: float) -> float:
    """:data:`MEASURED` at a number of images that need not be whole."""
    lower = math.floor(images)
    low, high = MEASURED.tick_s(lower), MEASURED.tick_s(lower + 1)
    return low + (high - low) * (images - lower)
