"""Factories of models whose code ends, or tries to end, what runs it."""

from __future__ import annotations

import os
import signal
from typing import Any

import tiny


def exits() -> Any:
    raise SystemExit(3)


def interrupts() -> Any:
    raise KeyboardInterrupt


def generator_exits() -> Any:
    raise GeneratorExit


def exiting_forward() -> Any:
    return _with_forward(exits)


def terminated_forward() -> Any:
    """Whose forward has SIGTERM arrive."""
    return _with_forward(lambda: os.kill(os.getpid(), signal.SIGTERM))


def interrupted_forward() -> Any:
    """Whose forward has Ctrl-C arrive."""
    return _with_forward(lambda: os.kill(os.getpid(), signal.SIGINT))


def terminated_pipeline() -> Any:
    """In whose own code, between two forwards, SIGTERM arrives."""
    pipe = tiny.sd3()
    original = type(pipe)

    class Pipeline(original):
        def prepare_latents(self, *args: Any, **kwargs: Any) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            return super().prepare_latents(*args, **kwargs)

    pipe.__class__ = Pipeline
    return pipe


def _with_forward(act: Any) -> Any:
    pipe = tiny.sd3()
    original = type(pipe.transformer)

    class Transformer(original):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            act()
            return super().forward(*args, **kwargs)

    pipe.transformer.__class__ = Transformer
    return pipe
