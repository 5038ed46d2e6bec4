"""Caches: what pipelines keep of keys and values from step to step, in objects of diffusers' own.

They are nothing but their attributes: tensors with rows, and settings. So a call that reads one is merged with others
like any other call, and what a call returns is split. A call that writes one has to write the request's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CLASSES = frozenset({"Flux2KVCache", "Flux2KVLayerCache", "GlmImageKVCache", "GlmImageLayerKVCache"})
"""By name: importing diffusers' models takes a while."""

_WRITES, _READS = "write", "read"
"""Modes of a cache that has some, as it does for each layer."""


def fields(value: Any) -> Mapping[str, Any] | None:
    """The attributes of a cache, less tensors that are not read now; None if it is none, or is to be written."""
    if type(value).__name__ not in CLASSES:
        return None
    own = vars(value)
    mode = own.get("mode", _READS)
    if mode == _WRITES:
        return None
    return own if mode == _READS else {name: [] if isinstance(part, list) else part for name, part in own.items()}


def made(cls: Any, attributes: Mapping[str, Any]) -> Any:
    """An object of nothing but these attributes."""
    value = cls.__new__(cls)
    vars(value).update(attributes)
    return value
