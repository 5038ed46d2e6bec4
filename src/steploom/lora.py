"""How a request says which LoRA adapters it wants, and what the names mean. Plain data, no torch."""

from __future__ import annotations

import difflib
import math
import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

from steploom.errors import ConfigError, InvalidRequest
from steploom.media.pictures import brief

MAX_ADAPTERS = 16
"""Adapters that one request may stack."""

MEANING = "[(name or path, scale), ...], the name of an adapter, or None"
"""What ``lora=`` is, for messages."""

Lora = str | tuple[str, float] | Iterable[str | tuple[str, float]] | Mapping[str, float]
"""How ``lora=`` may be given."""

_HUB_ID = re.compile(
    r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?:/[\w./-]+\.(safetensors|bin|pt)|(?<!\.safetensors)(?<!\.bin)(?<!\.pt))"
)
"""``owner/name``, or ``owner/name/file.safetensors``. What begins with a dot or a slash is a path."""

_MOST = 1e300


def listed(lora: Any) -> Any:
    """``lora`` as None, one name, or a list of pairs, whichever way it was given; what is none of these, as it is."""
    if isinstance(lora, os.PathLike):
        return os.fspath(cast("os.PathLike[str]", lora))
    entries: Any = list(cast("Mapping[Any, Any]", lora).items()) if isinstance(lora, Mapping) else lora
    if not isinstance(entries, (list, tuple)):
        return entries
    given = cast("list[Any]", entries)
    if isinstance(entries, tuple) and len(given) == 2 and isinstance(given[1], (int, float)):
        return [_pair(given)]
    return [_pair(entry) for entry in given]


def _pair(entry: object) -> Any:
    """One adapter with its scale; what is none, as it is."""
    if isinstance(entry, (str, os.PathLike)):
        return (os.fspath(cast("str", entry)), 1.0)
    pair = cast("list[Any]", entry)
    if not isinstance(entry, (list, tuple)) or len(pair) != 2 or not isinstance(pair[0], (str, os.PathLike)):
        return cast("Any", entry)
    name, scale = pair
    if getattr(scale, "ndim", None) == 0:  # numpy's and torch's numbers
        scale = scale.item()
    number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    return (os.fspath(cast("str", name)), float(scale) if number and abs(scale) < _MOST else scale)


def check(lora: str | list[Any] | None) -> None:
    """Refuses adapters that cannot be meant."""
    if lora == "":
        raise InvalidRequest("lora='': must not be empty; give a name, a path, or None", field="lora")
    names: set[str] = set()
    for entry in lora if isinstance(lora, list) else ():
        pair = cast("tuple[Any, ...]", entry)
        if not (isinstance(entry, tuple) and len(pair) == 2 and isinstance(pair[0], str) and pair[0]):
            raise InvalidRequest(
                f"lora={brief(lora)}: must be {MEANING}; {brief(entry)} is no (name or path, scale)", field="lora"
            )
        name, scale = pair
        if not isinstance(scale, float) or not math.isfinite(scale):
            raise InvalidRequest(
                f"lora={brief(lora)}: the scale of {brief(name)} must be a finite number", field="lora"
            )
        if name in names:
            raise InvalidRequest(f"lora={brief(lora)}: {brief(name)} is listed twice; give it one scale", field="lora")
        names.add(name)
    if len(names) > MAX_ADAPTERS:
        raise InvalidRequest(f"lora: {len(names)} adapters, at most {MAX_ADAPTERS} in one request", field="lora")


def find(name: str, named: Mapping[str, str], own: Iterable[str] = ()) -> str:
    """Where the adapter is that a request calls ``name``: a file, a folder, a hub id; ``name`` itself if in ``own``.

    Args:
        name: As the request says it.
        named: Places by name, of ``EngineConfig.loras``.
        own: Adapters that the application has loaded into its pipeline.

    Raises:
        InvalidRequest: It is none of these; lists the nearest known names.
    """
    if name in named:
        return named[name]
    if name in own or _exists(name) or _HUB_ID.fullmatch(name):
        return name
    known = sorted({*named, *own})
    nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if nearest:
        hint = f"did you mean {' or '.join(map(repr, nearest))}?"
    else:
        hint = f"the names are {', '.join(map(repr, known))}" if known else "EngineConfig.loras has no names"
    kinds = "neither a name of EngineConfig.loras, nor a file or folder, nor a hub id like 'owner/name'"
    raise InvalidRequest(f"lora={brief(name)}: {kinds}; {hint}", field="lora")


def check_places(named: Mapping[str, str]) -> None:
    """Refuses places by name (``EngineConfig.loras``) where nothing can be.

    Raises:
        ConfigError: Names the entry.
    """
    for name, where in named.items():
        if not _exists(where) and not _HUB_ID.fullmatch(where):
            raise ConfigError(
                f"loras[{brief(name)}]={brief(where)}: is no file or folder here, nor a hub id like 'owner/name'; "
                "check the path, or leave it out"
            )


def _exists(path: str) -> bool:
    try:
        return pathlib.Path(path).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # no path at all: too long, or a home that nobody has
        return False
