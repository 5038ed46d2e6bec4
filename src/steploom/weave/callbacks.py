"""Callbacks: the application's code within a program, which may change the modules that it is shown.

While one runs, whoever reads a part of a module (``pipe.unet.mid_block``) gets that of the program's own clone.
Pipelines read parts as well, at every request, and change none: to them the shared ones are shown, which costs nothing.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable
from typing import Any

_within: contextvars.ContextVar[bool] = contextvars.ContextVar("steploom_within_callback", default=False)


def within_callback() -> bool:
    """Whether the code that runs now is a callback's."""
    return _within.get()


def watch(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a pipeline's call, with callbacks that are watched: those that are shown the pipeline."""
    for name, value in arguments.items():
        if name.endswith("callback_on_step_end") and callable(value):
            arguments[name] = _watched(value)
    return arguments


def _watched(callback: Callable[..., Any]) -> Callable[..., Any]:
    """The same callback, during whose calls :func:`within_callback` is true.

    Pipelines ask whether it is one of diffusers' own kind, which has attributes: such a one stays what it is, and
    shares its attributes with the application's.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        token = _within.set(True)
        try:
            return callback(*args, **kwargs)
        finally:
            _within.reset(token)

    kind = type(callback)
    if not hasattr(kind, "tensor_inputs"):
        return functools.update_wrapper(call, callback)
    members = {"__call__": lambda self, *args, **kwargs: call(*args, **kwargs), "__module__": kind.__module__}
    same: Any = object.__new__(type(kind.__name__, (kind,), members))
    same.__dict__ = callback.__dict__
    return same
