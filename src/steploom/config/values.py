"""Values of settings: what each field takes, how a message says so, and how text becomes one."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping
from types import NoneType
from typing import Any, Literal, Protocol, cast, get_args

from steploom.errors import ConfigError

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
OffloadLevel = Literal["leaf_level", "block_level"]
AsideMode = Literal["auto", "thread", "slices", "off"]
Auto = Literal["auto"]
Share = float
Compiler = Mapping[str, Any]
"""Arguments of ``torch.compile``: ``mode``, ``backend``, ``dynamic``, ``fullgraph``, ``options``; and ``regional``."""

_CHOICES = {"Dtype": get_args(Dtype), "OffloadLevel": get_args(OffloadLevel), "AsideMode": get_args(AsideMode),
            "Auto": get_args(Auto)}  # fmt: skip

_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "str": ((str,), "a str that is not empty"),
    "int": ((int,), "an integer"),
    "float": ((int, float), "a number of seconds greater than 0"),
    "Share": ((int, float), "a share greater than 0 and at most 1"),
    "bool": ((bool,), "True or False"),
    "type": ((type,), "a class"),
    "None": ((NoneType,), "None"),
    "Mapping[str, str]": ((Mapping,), "a mapping of names to files, folders or hub ids"),
    "Mapping[str, Any]": ((Mapping,), "a mapping by name"),
    "Mapping[str, float]": ((Mapping,), "a mapping of names to numbers greater than 0"),
    "Compiler": ((Mapping,), "a mapping of torch.compile's arguments"),
    "QuantizationConfig": ((), "a quantization config of diffusers"),
    **{name: ((str,), f"one of {', '.join(map(repr, values))}") for name, values in _CHOICES.items()},
}
"""What the fields' annotations mean, and how a message says it."""

_LEAST = {"max_retries": 0, "encode_cache_bytes": 0, "compile_cache_bytes": 0, "max_message_bytes": 2**20}
"""The least that an integer may be, where that is not 1."""

LONGEST_S = 86400.0
"""Seconds that are as good as for ever, and that every system can wait."""

AUTO_BATCH = 64
"""Requests of a tick, at most, where the knee of its cost decides."""

_COMPILER: dict[Any, tuple[tuple[type, ...], str]] = {
    "mode": ((str,), "a mode of torch.compile"),
    "backend": ((str,), "a backend of torch.compile"),
    "dynamic": ((bool, NoneType), "True, False or None"),
    "fullgraph": ((bool,), "True or False"),
    "options": ((dict,), "a mapping of the backend's options"),
    "regional": ((bool,), "True or False"),
}
"""The arguments of ``compile``, and what they may be."""

_MOST = 2**63 - 1
"""The greatest integer that reaches a worker."""


class QuantizationConfig(Protocol):
    """A quantization config of diffusers or transformers, or a ``PipelineQuantizationConfig`` (a mapping of them)."""

    quant_method: Any


def _is_quantization(value: object) -> bool:
    return not isinstance(value, type) and (hasattr(value, "quant_method") or hasattr(value, "quant_mapping"))


def plain(name: str, value: Any) -> Any:
    """``value`` without what only says the same in other types: paths, torch's dtypes and devices."""
    if name == "compile" and isinstance(value, Mapping):
        return dict(cast("Mapping[Any, Any]", value)) or True
    if name in ("model", "base_model") and isinstance(value, os.PathLike):
        return os.fspath(cast("os.PathLike[str]", value))
    if name in ("dtype", "device") and (type(value).__module__, type(value).__name__) == ("torch", name):
        return str(value).removeprefix("torch.")
    if name in ("dtype", "components") and isinstance(value, Mapping):
        entries = cast("Mapping[Any, Any]", value)
        return {key: plain("dtype" if name == "dtype" else "model", entry) for key, entry in entries.items()}
    return value


def check(field: dataclasses.Field[Any], value: Any) -> None:
    """Refuses a value that is not of its field's type, or out of bounds.

    Raises:
        ConfigError: It names the field, the value and what would do.
    """
    names = str(field.type).split(" | ")
    kinds = [kind for name in names for kind in _KINDS[name][0]]
    # bool is a subclass of int, and True is not what anybody means by 1.
    fits = isinstance(value, tuple(kinds)) and (bool in kinds or not isinstance(value, bool))
    fits = fits or ("QuantizationConfig" in names and _is_quantization(value))
    least = _LEAST.get(field.name, 1)
    if fits and isinstance(value, str):
        fits = bool(value) and all(value in _CHOICES[name] for name in names if name in _CHOICES)
    elif fits and isinstance(value, (int, float)) and bool not in kinds:
        fits = value >= least if "int" in names else 0 < value <= (1 if "Share" in names else math.inf)
        fits = fits and (isinstance(value, float) or value <= _MOST)
    if fits and "Mapping[str, str]" in names and isinstance(value, Mapping):
        entries = cast("Mapping[Any, Any]", value).items()
        fits = all(isinstance(part, str) and part for entry in entries for part in entry)
    if fits and "Mapping[str, float]" in names and isinstance(value, Mapping):
        entries = cast("Mapping[Any, Any]", value).items()
        fits = all(isinstance(name, str) and _weighs(weight) for name, weight in entries)
    if fits:
        return
    bounds = f" of at least {least}" + (" and below 2**63" if isinstance(value, int) and value > _MOST else "")
    meanings = [_KINDS[name][1] + (bounds if name == "int" else "") for name in names]
    raise ConfigError(f"{field.name}={value!r}: must be {' or '.join(meanings)}; the default is {field.default!r}")


def _weighs(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def is_seconds(value: object) -> bool:
    """Whether it is a number of seconds for a clock, or infinity; what is below 0 has passed already."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return not math.isnan(value) if isinstance(value, float) else abs(value) <= _MOST


def _mapping(value: Any) -> Mapping[Any, Any]:
    return cast("Mapping[Any, Any]", value) if isinstance(value, Mapping) else {}


def check_entries(dtype: Any, compiler: Any, components: Any) -> None:
    """Refuses entries of the mappings ``dtype`` and ``components`` that mean nothing."""
    known = [name for name in _CHOICES["Dtype"] if name != "auto"]
    for name, value in _mapping(dtype).items():
        if value not in known:
            raise ConfigError(f"dtype[{name!r}]={value!r}: must be one of {', '.join(map(repr, known))}")
    for name, value in _mapping(compiler).items():
        kinds, meaning = _COMPILER.get(name, ((), ""))
        if not kinds:
            raise ConfigError(f"compile[{name!r}]={value!r}: there is no such argument; give {', '.join(_COMPILER)}")
        if not isinstance(value, kinds):
            raise ConfigError(f"compile[{name!r}]={value!r}: must be {meaning}")
    for name, value in _mapping(components).items():
        if value is not None and not (isinstance(value, str) and value):
            raise ConfigError(
                f"components[{name!r}]={value!r}: must be a folder, a hub id or a file, or None to leave it out"
            )


def sizes(text: str) -> list[tuple[int, int]]:
    """``"512x512,1024x768"`` as widths and heights.

    Raises:
        ConfigError: It is something else.
    """
    found: list[tuple[int, int]] = []
    for part in text.split(",") if text else []:
        width, cross, height = part.strip().partition("x")
        if not (cross and width.isdecimal() and height.isdecimal() and int(width) and int(height)):
            raise ConfigError(f"profile={text!r}: must be sizes in pixels, as '512x512,1024x768'")
        found.append((int(width), int(height)))
    return found


def is_none(field: dataclasses.Field[Any], raw: object) -> bool:
    """Whether it is the word for None, of a field that may be None."""
    return isinstance(raw, str) and raw.lower() == "none" and "None" in str(field.type).split(" | ")


def parse(field: dataclasses.Field[Any], raw: str) -> Any:
    """``raw`` as the type of its field: what may be a mapping is one if it is written as JSON."""
    if is_none(field, raw):
        return None
    names, default = str(field.type).split(" | "), field.default
    kinds: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "Share": float}
    meanings = {"bool": "true or false", "int": "an integer", "float": "a number", "Share": "a number"}
    other = "name=path,name=path" if "Mapping[str, str]" in names else "a JSON object"
    meaning = next((meanings[name] for name in names if name in meanings), other)
    if "Mapping[str, float]" in names:
        meaning = "name=number,name=number"
    if names == ["int", "Auto"]:
        meaning = "an integer or auto"
    if "None" in names:
        meaning += " or none"
    try:
        if names[-1] == "bool":
            return json.loads(raw) if raw.startswith("{") else _flag(raw)
        if "Mapping[str, str]" in names and not raw.startswith("{"):
            return _entries(raw)
        if "Mapping[str, float]" in names and not raw.startswith("{"):
            return {name: float(weight) for name, weight in _entries(raw).items()}
        if "Auto" in names and raw == "auto":
            return raw
        if raw.startswith("{") or ("Mapping[str, Any]" in names and "str" not in names and names[0] not in _CHOICES):
            return json.loads(raw)
        return kinds.get(names[0], str)(raw)
    except (ValueError, KeyError):
        mend = f"unset it for the default, {default!r}"
        raise ConfigError(f"STEPLOOM_{field.name.upper()}={raw!r}: must be {meaning}; {mend}") from None


def _flag(raw: str) -> bool:
    return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[raw.lower()]


def _entries(raw: str) -> dict[str, str]:
    """``name=path,name=path`` as a mapping."""
    entries: dict[str, str] = {}
    for entry in raw.split(","):
        name, place = entry.split("=", 1)
        entries[name.strip()] = place.strip()
    return entries
