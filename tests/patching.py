"""What applications do to their pipelines, such that the outcome tells whose pipeline was meant: by its guidance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def factor(pipe: Any) -> float:
    """One for guidance below 4.5, another one from there on."""
    return 0.9 if pipe.guidance_scale < 4.5 else 0.5


def step_by(pipe: Any, own: Callable[[], Any]) -> None:
    """Steps by the factor of ``own()``."""
    inner = pipe.scheduler.step
    pipe.scheduler.step = lambda output, *args, **kwargs: inner(output * factor(own()), *args, **kwargs)


def with_prompts(pipe: Any, scale: Callable[[Any], float]) -> None:
    """Makes it one of a subclass that scales what it makes of prompts."""
    cls = type(pipe)

    class Mine(cls):
        def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
            return [None if one is None else one * scale(self) for one in super().encode_prompt(*args, **kwargs)]

    pipe.__class__ = Mine
