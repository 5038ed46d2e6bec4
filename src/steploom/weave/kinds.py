"""What an object is by its class alone: the object itself may say otherwise, or raise."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from steploom.errors import raised

log = logging.getLogger(__name__)


def derives(value: Any, *names: str) -> bool:
    """Whether the class of ``value`` derives from one of such a name. What a class of classes says is not asked for."""
    classes = type.__getattribute__(type(value), "__mro__")
    return any(type.__getattribute__(one, "__name__") in names for one in classes)


def is_module(value: Any) -> bool:
    """Whether ``value`` is a module that can be looked into: one of TorchScript is just called."""
    return issubclass(type(value), nn.Module) and not issubclass(type(value), torch.jit.ScriptModule)


def is_a(value: Any, kind: Any) -> bool:
    """As ``isinstance``, whatever the object says of itself. ``kind``: a class, a tuple or a union of some."""
    return issubclass(type(value), kind)


def offers(value: Any, name: str) -> bool:
    """Whether ``value`` has such a method, also by a ``__getattr__`` of its own; one that raises has none."""
    try:
        return callable(getattr(value, name, None))
    except Exception as fault:  # noqa: BLE001 - whatever the application's class raises: recorded, and it has none
        log.info("a %s was asked for %s: %s", type(value).__name__, name, raised(fault))
        return False
