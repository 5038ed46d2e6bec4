"""Pictures that requests bring along: another for each request, the same each time."""

from __future__ import annotations

from typing import Any

import numpy as np
from conformance.case import Inputs
from PIL import Image

SIZE = 32


def picture(i: int, size: int = SIZE, mode: str = "RGB") -> Any:
    """Coloured noise, another for each ``i``."""
    shape = (size, size) if mode == "L" else (size, size, 3)
    return Image.fromarray(np.random.default_rng(i).integers(0, 256, shape, dtype=np.uint8), mode)


def strength(i: int) -> float:
    """How much of its picture request ``i`` gives up."""
    return (0.5, 0.7, 0.6)[i]


def adding(inputs: Inputs, **more: Any) -> Inputs:
    """``inputs`` and ``more`` arguments: values, or functions of the request's number."""
    return lambda i: {**inputs(i), **{name: value(i) if callable(value) else value for name, value in more.items()}}
