"""What a pipeline says of what it is about to make, told to whoever bounds it before the first step."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

_SAYING = ("check_inputs", "prepare_latents")
"""Methods that pipelines pass the size and the frames of what they make, once they have settled them."""
_LATENTS = "prepare_latents"
"""The one that gives the latents that they begin with."""
_FRAMES = ("num_frames", "video_length")


class Bounds(Protocol):
    """Who bounds what a program makes; all methods may raise."""

    def laid_out(self, width: int | None, height: int | None, frames: int | None) -> None:
        """The pipeline makes images of this size, and so many frames of all its videos at once, as far as it says."""
        ...

    def prepared(self, pipeline_class: str, shape: Sequence[int]) -> None:
        """A pipeline of this class begins with latents of this shape; a cascade has several."""
        ...

    def counted(self, steps: int, before: int, noise_schedulers: Sequence[Any]) -> None:
        """A pipeline is about to take ``steps`` steps with these noise schedulers, and has taken ``before``."""
        ...


def telling(cls: type) -> dict[str, Callable[..., Any]]:
    """The methods of a pipeline class that are passed what it makes, but they tell it first."""
    return {name: told for name in _SAYING if (told := _telling(cls, name)) is not None}


def _telling(cls: type, name: str) -> Callable[..., Any] | None:
    method = inspect.getattr_static(cls, name, None)
    if not inspect.isfunction(method):
        return None
    signature = inspect.signature(method)
    if name != _LATENTS and not signature.parameters.keys() & {"width", *_FRAMES}:
        return None

    @functools.wraps(method)
    def told(self: Any, *args: Any, **kwargs: Any) -> Any:
        bounds: Bounds | None = self._steploom[0].bounds
        if bounds is None:
            return method(self, *args, **kwargs)
        passed = signature.bind(self, *args, **kwargs).arguments
        bounds.laid_out(_count(passed, "width"), _count(passed, "height"), _frames(passed))
        made = method(self, *args, **kwargs)
        latents: Any = made[0] if isinstance(made, tuple) and made else made
        if name == _LATENTS and isinstance(latents, torch.Tensor):
            bounds.prepared(cls.__name__, tuple(latents.shape))
        return made

    return told


def _frames(passed: Mapping[str, Any]) -> int | None:
    """The frames of all videos together."""
    frames = next((count for name in _FRAMES if (count := _count(passed, name))), None)
    return None if frames is None else frames * (_count(passed, "batch_size") or 1)


def _count(passed: Mapping[str, Any], name: str) -> int | None:
    value = passed.get(name)
    return value if isinstance(value, int) else None
