"""The fields of a request for images: what each may be, whether it comes as JSON or as the strings of a form.

OpenAI's own fields have OpenAI's names and meanings; the others are called as vLLM-Omni and SGLang call them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

from steploom.errors import InvalidRequest
from steploom.server.errors import ApiError, invalid
from steploom.server.settings import ServerSettings

FORMATS = ("png", "webp", "jpeg")
MAX_PARTIAL_IMAGES = 3
_SIZE = re.compile(r"([1-9]\d{0,5})x([1-9]\d{0,5})")
_TRUTH = {"true": True, "false": False, "1": True, "0": False}

IGNORED = ("quality", "style", "moderation", "input_fidelity", "complexity")
"""OpenAI's fields that mean nothing here: any value is taken."""

_IMPOSSIBLE = {
    "frame_count": "belongs to output_format=gif, which cannot be made here; leave it out",
    "frame_duration_ms": "belongs to output_format=gif, which cannot be made here; leave it out",
    "svg": "belongs to output_format=svg, which cannot be made here; leave it out",
    "markup": "an overlay cannot be used here; draw it into the image, or give a mask",
}

Reader = Callable[[str, Any], Any]
"""Takes a field's name and raw value, returns the value, or raises what is wrong with it."""


@dataclasses.dataclass(kw_only=True)
class ImageFields:
    """A request for images, read and typed. None is "not given".

    Attributes:
        prompt: What to draw.
        n: How many images, each with a seed of its own.
        size: ``(width, height)`` in pixels.
        output_format: ``png``, ``webp`` or ``jpeg``.
        output_compression: Quality of ``webp`` and ``jpeg``, 0 to 100.
        response_format: ``b64_json`` or ``url``.
        background: As asked for.
        quality: As asked for; without effect.
        stream: Whether to answer with server-sent events.
        partial_images: Previews of each image, at most.
        model: What the client calls the model.
        user: Whom to charge: ``safety_identifier``, or else ``user``.
        safety_identifier: As given.
        own: Fields of ours, for :class:`~steploom.DiffusionRequest`.
        params: Arguments of the pipeline.
        images: Pictures to start from, as bytes of files.
        mask: Bytes of a picture.
    """

    prompt: str = ""
    n: int = 1
    size: tuple[int, int] | None = None
    output_format: str = "png"
    output_compression: int | None = None
    response_format: str = "b64_json"
    background: str = "auto"
    quality: str = "auto"
    stream: bool = False
    partial_images: int = 0
    model: str | None = None
    user: str | None = None
    safety_identifier: str | None = None
    own: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    params: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    images: list[bytes] = dataclasses.field(default_factory=list[bytes])
    mask: bytes | None = None


def text(name: str, value: Any) -> str:
    """A str."""
    if not isinstance(value, str):
        raise invalid(f"{name}={value!r:.80}: must be a string", name, "invalid_type")
    return value


def whole(least: int, most: int | None = None) -> Reader:
    """An integer between bounds."""

    def read(name: str, value: Any) -> int:
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = int(value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise invalid(f"{name}={value!r:.80}: must be an integer", name, "invalid_type")
        if value < least or (most is not None and value > most):
            bounds = f"between {least} and {most}" if most is not None else f"of at least {least}"
            raise invalid(f"{name}={value}: must be an integer {bounds}", name)
        return value

    return read


def number(name: str, value: Any) -> float:
    """A finite number."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise invalid(f"{name}={value!r:.80}: must be a finite number", name, "invalid_type")
    return float(value)


def seconds(name: str, value: Any) -> float:
    """A number greater than 0."""
    found = number(name, value)
    if found <= 0:
        raise invalid(f"{name}={value!r}: must be greater than 0 seconds", name)
    return found


def flag(name: str, value: Any) -> bool:
    """True or false."""
    if isinstance(value, str):
        value = _TRUTH.get(value.lower(), value)
    if not isinstance(value, bool):
        raise invalid(f"{name}={value!r:.80}: must be true or false", name, "invalid_type")
    return value


def choice(*known: str, mend: str = "") -> Reader:
    """One of some words."""

    def read(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in known:
            raise invalid(f"{name}={value!r:.80}: must be one of {', '.join(known)}{mend}", name)
        return value

    return read


def size(name: str, value: Any) -> tuple[int, int] | None:
    """``WIDTHxHEIGHT``; None for ``auto``."""
    found = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if found is None and value != "auto":
        raise invalid(f"{name}={value!r:.80}: must read WIDTHxHEIGHT, for example 512x768, or auto", name)
    return (int(found[1]), int(found[2])) if found else None


def adapters(name: str, value: Any) -> list[tuple[str, float]]:
    """LoRA adapters by name: ``"ink"``, ``{"name": "ink", "scale": 0.8}``, ``["ink", 0.8]``, or a list of such."""
    if isinstance(value, str) and value[:1] in ("[", "{"):
        try:
            value = json.loads(value)
        except ValueError:
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
    return (pair[0], number(name, pair[1]))


_FORMAT = choice(*FORMATS, mend="; other formats cannot be made here")
_BACKGROUND = choice("auto", "opaque", mend="; the model paints no transparency")

OPENAI: dict[str, Reader] = {
    "prompt": text,
    "model": text,
    "n": whole(1),
    "size": size,
    "output_format": _FORMAT,
    "output_compression": whole(0, 100),
    "response_format": choice("b64_json", "url"),
    "background": _BACKGROUND,
    "stream": flag,
    "partial_images": whole(0, MAX_PARTIAL_IMAGES),
    "user": text,
    "safety_identifier": text,
}
"""Fields of OpenAI's, by name."""

OWN: dict[str, Reader] = {
    "seed": whole(-(2**63), 2**64 - 1),
    "priority": whole(-(2**31), 2**31 - 1),
    "timeout": seconds,
    "deadline": seconds,
    "lora": adapters,
}
"""Fields of :class:`~steploom.DiffusionRequest`."""

PARAMS: dict[str, Reader] = {
    "negative_prompt": text,
    "num_inference_steps": whole(1),
    "guidance_scale": number,
    "true_cfg_scale": number,
    "strength": number,
}
"""Arguments of the pipeline."""

SIZES: dict[str, Reader] = {"width": whole(1), "height": whole(1)}


def read_fields(given: Mapping[str, Any], settings: ServerSettings) -> ImageFields:
    """The typed fields of a body that was decoded already, without its pictures. Null is "not given".

    Raises:
        ApiError: 400 with the field's name in ``param``.
    """
    fields = ImageFields()
    sides: dict[str, int] = {}
    for name, value in given.items():
        if name in _IMPOSSIBLE and value is not None:
            raise invalid(f"{name}: {_IMPOSSIBLE[name]}", name, "unsupported_parameter")
        if value is None or name in _IMPOSSIBLE:
            continue
        if name in OPENAI:
            setattr(fields, name, OPENAI[name](name, value))
        elif name in OWN:
            fields.own[name] = OWN[name](name, value)
        elif name in PARAMS:
            fields.params[name] = PARAMS[name](name, value)
        elif name in SIZES:
            sides[name] = SIZES[name](name, value)
        elif name not in IGNORED:
            raise _unknown(name)
    fields.quality = given["quality"] if isinstance(given.get("quality"), str) else "auto"
    _check(fields, sides, settings)
    fields.params.update(sides or (_sides(fields.size)))
    fields.user = fields.safety_identifier or fields.user
    return fields


def _sides(found: tuple[int, int] | None) -> dict[str, int]:
    return {"width": found[0], "height": found[1]} if found else {}


def _check(fields: ImageFields, sides: Mapping[str, int], settings: ServerSettings) -> None:
    if not fields.prompt:
        raise invalid("prompt: must be given, and not empty", "prompt", "missing_required_parameter")
    if len(fields.prompt) > settings.max_prompt_chars:
        raise invalid(f"prompt: {len(fields.prompt)} characters, at most {settings.max_prompt_chars}", "prompt")
    if fields.n > settings.max_images:
        raise invalid(f"n={fields.n}: must be at most {settings.max_images}", "n")
    if sides and fields.size is not None and sides != _sides(fields.size):
        raise invalid("size: give either size or width and height", "size")
    if fields.output_format == "png" and fields.output_compression not in (None, 100):
        raise invalid(
            f"output_compression={fields.output_compression}: png loses nothing; use output_format webp or jpeg",
            "output_compression",
        )
    if fields.stream and fields.response_format == "url":
        raise invalid("response_format='url': a stream carries the images themselves; use b64_json", "response_format")


def _unknown(name: str) -> ApiError:
    if name in ("image", "mask"):
        return invalid(f"{name}: belongs to /v1/images/edits; send it there", name, "unknown_parameter")
    return unknown(name, {*OPENAI, *OWN, *PARAMS, *SIZES, *IGNORED})


def unknown(name: str, known: Iterable[str]) -> ApiError:
    """The refusal of a field that is none of ``known``."""
    nearest = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(nearest)}?" if nearest else f"there are {', '.join(sorted(known))}"
    return invalid(f"{name:.80}: unknown parameter; {hint}", name[:80], "unknown_parameter")


def param_of(error: InvalidRequest, fields: ImageFields) -> str | None:
    """What the client called the field that the engine refused."""
    if error.field in ("width", "height") and fields.size is not None:
        return "size"
    if error.field == "task":  # which follows from the pictures
        return "mask" if fields.mask is not None else "image"
    return "mask" if error.field == "mask_image" else error.field
