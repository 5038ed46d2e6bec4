"""What the pretended engine of :mod:`steploom.testing` draws: coloured squares, and latents without torch."""

from __future__ import annotations

import hashlib
import importlib
import random
from array import array
from collections.abc import Sequence
from typing import Any

from PIL import Image

from steploom.requests import DiffusionRequest

DEFAULT_SIZE = (64, 64)
SIZE_MULTIPLE = 8
_GRAIN = 8


def _rows(request: DiffusionRequest) -> int:
    prompts = len(request.prompt) if isinstance(request.prompt, list) else 1
    names = ("num_images_per_prompt", "num_videos_per_prompt")
    return prompts * next((count for name in names if (count := request.params.get(name))), 1)


def _size(request: DiffusionRequest) -> tuple[int, int]:
    width, height = (request.params.get(side) for side in ("width", "height"))
    return width or DEFAULT_SIZE[0], height or DEFAULT_SIZE[1]


def images(request: DiffusionRequest, total: int) -> Any:
    """What ``output_type`` asks for; only who asks for numpy or torch gets them imported."""
    if request.output_type == "latent":
        return latents(request, [total], total)
    pictures = [picture(request, index, 1.0) for index in range(_rows(request))]
    if request.output_type not in ("np", "pt"):
        return pictures
    numpy: Any = importlib.import_module("numpy")
    arrays = numpy.stack([numpy.asarray(picture, dtype="float32") / 255 for picture in pictures])
    return arrays if request.output_type == "np" else importlib.import_module("torch").tensor(arrays).movedim(-1, 1)


def films(request: DiffusionRequest, frames: int) -> list[list[Image.Image]]:
    """Videos of so many frames, or of as many as are asked for; each frame is another picture."""
    frames = request.params.get("num_frames") or frames
    return [[picture(request, row * frames + place, 1.0) for place in range(frames)] for row in range(_rows(request))]


def latents(request: DiffusionRequest, steps: Sequence[int], total: int, trajectory: bool = False) -> memoryview[Any]:
    """``[rows, 4, height / 8, width / 8]`` after a step, or after each of several: less and less noise."""
    width, height = _size(request)
    shape = [_rows(request), 4, height // SIZE_MULTIPLE, width // SIZE_MULTIPLE]
    draw = _draw(request, "latents")
    noise = [draw.gauss() for _ in range(shape[0] * shape[1] * shape[2] * shape[3])]
    values = [value * (1 - step / total / 2) for step in steps for value in noise]
    return floats(values, [len(steps), *shape] if trajectory else shape)


def floats(values: Sequence[float], shape: list[int]) -> memoryview[Any]:
    """An array of float32, of whatever shape."""
    return memoryview(array("f", values).tobytes()).cast("f", shape)


def _draw(request: DiffusionRequest, what: object) -> random.Random:
    """Random numbers that come from whatever of the request a model would look at."""
    names = ("guidance_scale", "negative_prompt", "strength", "image", "mask_image")
    params = [request.params.get(name) for name in names]
    shown = [hashlib.sha256(one.tobytes()).digest() if isinstance(one, Image.Image) else one for one in params]
    told = f"{request.prompt}|{request.seed}|{what}|{shown}|{request.adapters}"
    return random.Random(hashlib.sha256(told.encode()).digest())


def picture(request: DiffusionRequest, index: int, done: float) -> Image.Image:
    """Squares whose colours come from the request and their place; the less is ``done``, the more of them are grey."""
    draw = _draw(request, index)
    colours = [tuple(int(128 + (draw.randrange(256) - 128) * done) for _ in range(3)) for _ in range(_GRAIN * _GRAIN)]
    picture = Image.new("RGB", (_GRAIN, _GRAIN))
    picture.putdata(colours)
    return picture.resize(_size(request), Image.Resampling.NEAREST)
