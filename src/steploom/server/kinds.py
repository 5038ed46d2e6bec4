"""Kinds of fields: how each is read, out of JSON or out of the text of a form, and how the OpenAPI document says it.

JSON has types, so a number must be one; in a form everything is text, so there ``"2"`` and ``"true"`` are read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, cast

from steploom import step_caches
from steploom.errors import InvalidRequest
from steploom.server.errors import invalid

Reader = Callable[[str, Any], Any]
"""Takes a field's name and raw value, returns the value, or raises what is wrong with it."""

LARGEST = 2**31 - 1
"""Of integers that have no bound of their own."""

_SIZE = r"[1-9][0-9]{0,5}x[1-9][0-9]{0,5}"
_TRUTH = {"true": True, "false": False, "1": True, "0": False}


class FormText(str):
    """A value of a form: what is meant may be a number, or a truth value, or JSON."""

    __slots__ = ()


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of field. Called with a field's name and raw value, it reads it.

    Attributes:
        read: Does that.
        schema: JSON Schema of the values that it takes in JSON, but for null, which is "not given".
    """

    read: Reader
    schema: Mapping[str, Any]

    def __call__(self, name: str, value: Any) -> Any:
        """Returns the value.

        Raises:
            ApiError: 400: what is wrong with it.
        """
        return self.read(name, value)


def texts(least: int, most: int) -> Kind:
    """A str of so many characters."""

    def read(name: str, value: Any) -> str:
        found = _text(name, value)
        if len(found) < least:
            raise invalid(f"{name}: must be given, and not empty", name, "missing_required_parameter")
        if len(found) > most:
            raise invalid(f"{name}: {len(found)} characters, at most {most}", name)
        return found

    return Kind(read, {"type": "string", "minLength": least, "maxLength": most})


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise invalid(f"{name}={value!r:.80}: must be a string", name, "invalid_type")
    return str(value)


text = Kind(_text, {"type": "string"})
"""A str."""


def whole(least: int, most: int = LARGEST) -> Kind:
    """An integer between bounds."""

    def read(name: str, value: Any) -> int:
        if isinstance(value, FormText):
            with contextlib.suppress(ValueError):
                value = int(value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise invalid(f"{name}={value!r:.80}: must be an integer", name, "invalid_type")
        if not least <= value <= most:
            bounds = f"of at least {least}" if most == LARGEST > value else f"between {least} and {most}"
            raise invalid(f"{name}={value!s:.80}: must be an integer {bounds}", name)
        return value

    return Kind(read, {"type": "integer", "minimum": least, "maximum": most})


def _number(name: str, value: Any) -> float:
    found = value
    if isinstance(value, FormText):
        with contextlib.suppress(ValueError):
            found = float(value)
    if isinstance(found, (int, float)) and not isinstance(found, bool):
        with contextlib.suppress(OverflowError):  # an integer of JSON may have any number of digits
            if math.isfinite(found):
                return float(found)
    raise invalid(f"{name}={value!r:.80}: must be a finite number", name, "invalid_type")


number = Kind(_number, {"type": "number"})
"""A finite number."""


def between(least: float, most: float, *, above: bool = False) -> Kind:
    """A finite number between bounds; ``above``: it must not be the lower one."""

    def read(name: str, value: Any) -> float:
        found = number(name, value)
        if not least <= found <= most or (above and found == least):
            bounds = f"greater than {least:g} and at most {most:g}" if above else f"between {least:g} and {most:g}"
            raise invalid(f"{name}={found:g}: must be {bounds}", name)
        return found

    return Kind(read, {"type": "number", "exclusiveMinimum" if above else "minimum": least, "maximum": most})


scale = between(-1000, 1000)
"""How strong something is. Far beyond what is of use, numbers overflow, and the image is black."""


def _seconds(name: str, value: Any) -> float:
    found = number(name, value)
    if found <= 0:
        raise invalid(f"{name}={value!r:.80}: must be greater than 0 seconds", name)
    return found


seconds = Kind(_seconds, {"type": "number", "exclusiveMinimum": 0})
"""A number greater than 0."""


def _flag(name: str, value: Any) -> bool:
    if isinstance(value, FormText):
        value = _TRUTH.get(value.lower(), value)
    if not isinstance(value, bool):
        raise invalid(f"{name}={value!r:.80}: must be true or false", name, "invalid_type")
    return value


flag = Kind(_flag, {"type": "boolean"})
"""True or false."""


def choice(*known: str, mend: str = "") -> Kind:
    """One of some words."""

    def read(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in known:
            raise invalid(f"{name}={value!r:.80}: must be one of {', '.join(known)}{mend}", name)
        return str(value)

    return Kind(read, {"type": "string", "enum": list(known)})


def _read_size(name: str, value: Any) -> tuple[int, int] | None:
    if isinstance(value, str) and re.fullmatch(_SIZE, value):
        width, height = value.split("x")
        return int(width), int(height)
    if value != "auto":
        raise invalid(f"{name}={value!r:.80}: must read WIDTHxHEIGHT, for example 512x768, or auto", name)
    return None


size = Kind(_read_size, {"type": "string", "pattern": f"^(auto|{_SIZE})$"})
"""``WIDTHxHEIGHT``; None for ``auto``."""


def _adapters(name: str, value: Any) -> list[tuple[str, float]]:
    if isinstance(value, FormText) and value[:1] in ("[", "{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise invalid(f"{name}={value!r:.80}: is no JSON", name) from None
    entries: list[Any] = cast("list[Any]", value) if isinstance(value, list) else [value]
    if len(entries) == 2 and isinstance(entries[0], str) and isinstance(entries[1], (int, float)):
        entries = [entries]
    return [_adapter(name, entry) for entry in entries]


def _adapter(name: str, entry: Any) -> tuple[str, float]:
    found: Any = entry
    if isinstance(entry, dict):
        given = cast("dict[str, Any]", entry)
        known = {"name", "scale"}
        if set(given) <= known and "name" in given:
            found = (given["name"], given.get("scale", 1.0))
    pair = (found, 1.0) if isinstance(found, str) else found
    if not isinstance(pair, (list, tuple)) or len(cast("list[Any]", pair)) != 2 or not isinstance(pair[0], str):
        raise invalid(f'{name}={entry!r:.80}: must be a name, or {{"name": ..., "scale": ...}}', name)
    return (str(pair[0]), scale(name, pair[1]))


_PAIR = {"type": "array", "prefixItems": [text.schema, scale.schema], "minItems": 2, "maxItems": 2}
_NAMED = {
    "type": "object", "properties": {"name": text.schema, "scale": scale.schema}, "required": ["name"],
    "additionalProperties": False,
}  # fmt: skip
_ADAPTER = [text.schema, _NAMED, _PAIR]
adapters = Kind(_adapters, {"anyOf": [*_ADAPTER, {"type": "array", "items": {"anyOf": _ADAPTER}}]})
"""LoRA adapters by name: ``"ink"``, ``{"name": "ink", "scale": 0.8}``, ``["ink", 0.8]``, or a list of such."""


def _step_cache(name: str, value: Any) -> str:
    found = _text(name, value)
    try:
        step_caches.parse(found)
    except InvalidRequest as error:
        raise invalid(f"{name}{str(error).removeprefix('cache')}", name) from None
    return found


step_cache = Kind(_step_cache, {"type": "string", "pattern": f"^({step_caches.PATTERN})$"})
"""How steps are skipped: ``easycache``, ``easycache:0.1`` or ``off``."""
