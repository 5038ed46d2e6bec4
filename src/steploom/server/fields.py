"""The fields of a request for images: what each may be, whether it comes as JSON or as the strings of a form.

OpenAI's own fields have OpenAI's names and meanings; the others are called as vLLM-Omni and SGLang call them.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from steploom.errors import InvalidRequest
from steploom.server.errors import ApiError, invalid
from steploom.server.kinds import (
    Kind,
    adapters,
    between,
    choice,
    flag,
    scale,
    seconds,
    size,
    step_cache,
    text,
    texts,
    whole,
)
from steploom.server.settings import ServerSettings

FORMATS = ("png", "webp", "jpeg")
MAX_PARTIAL_IMAGES = 3

IGNORED = ("quality", "style", "moderation", "input_fidelity", "complexity")
"""OpenAI's fields that mean nothing here: any value is taken."""

IMPOSSIBLE = {
    "frame_count": "belongs to output_format=gif, which cannot be made here; leave it out",
    "frame_duration_ms": "belongs to output_format=gif, which cannot be made here; leave it out",
    "svg": "belongs to output_format=svg, which cannot be made here; leave it out",
    "markup": "an overlay cannot be used here; draw it into the image, or give a mask",
    "image": "belongs to /v1/images/edits; send it there",
    "images": "belongs to /v1/images/edits; send it there",
    "mask": "belongs to /v1/images/edits; send it there",
}
"""Fields that can only be null, and why."""


@dataclasses.dataclass(kw_only=True)
class CommonFields:
    """What requests for images and for videos have in common, read and typed. None is "not given".

    Attributes:
        prompt: What to draw.
        size: ``(width, height)`` in pixels.
        model: What the client calls the model.
        user: Whom to charge: ``safety_identifier``, or else ``user``.
        safety_identifier: As given.
        own: Fields of ours, for :class:`~steploom.DiffusionRequest`.
        params: Arguments of the pipeline.
    """

    prompt: str = ""
    size: tuple[int, int] | None = None
    model: str | None = None
    user: str | None = None
    safety_identifier: str | None = None
    own: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    params: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])


@dataclasses.dataclass(kw_only=True)
class ImageFields(CommonFields):
    """A request for images.

    Attributes:
        n: How many images, each with a seed of its own.
        output_format: ``png``, ``webp`` or ``jpeg``.
        output_compression: Quality of ``webp`` and ``jpeg``, 0 to 100.
        response_format: ``b64_json`` or ``url``.
        background: As asked for.
        quality: As asked for; without effect.
        stream: Whether to answer with server-sent events.
        partial_images: Previews of each image, at most.
        preview_every: A preview every so many steps instead, as small as it is made; 0 is never.
        metadata: Whether a PNG file says how it was made.
        images: Pictures to start from, as bytes of files.
        mask: Bytes of a picture.
    """

    n: int = 1
    output_format: str = "png"
    output_compression: int | None = None
    response_format: str = "b64_json"
    background: str = "auto"
    quality: str = "auto"
    stream: bool = False
    partial_images: int = 0
    preview_every: int = 0
    metadata: bool = False
    images: list[bytes] = dataclasses.field(default_factory=list[bytes])
    mask: bytes | None = None


_FORMAT = choice(*FORMATS, mend="; other formats cannot be made here")
_BACKGROUND = choice("auto", "opaque", mend="; the model paints no transparency")

OPENAI: dict[str, Kind] = {
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

ANSWER: dict[str, Kind] = {"preview_every": whole(0), "metadata": flag}
"""Fields of ours about the answer."""

OWN: dict[str, Kind] = {
    "seed": whole(-(2**63), 2**64 - 1),
    "priority": whole(-(2**31), 2**31 - 1),
    "timeout": seconds,
    "deadline": seconds,
    "lora": adapters,
    "cache": step_cache,
}
"""Fields of :class:`~steploom.DiffusionRequest`."""

PARAMS: dict[str, Kind] = {
    "negative_prompt": text,
    "num_inference_steps": whole(1),
    "guidance_scale": scale,
    "true_cfg_scale": scale,
    "strength": between(0, 1, above=True),
}
"""Arguments of the pipeline."""

SIZES: dict[str, Kind] = {"width": whole(1), "height": whole(1)}


def known_fields(settings: ServerSettings) -> Mapping[str, Kind]:
    """Every field that is read, with the bounds of this server."""
    return _known(settings.max_prompt_chars, settings.max_images)


@functools.lru_cache(maxsize=16)
def _known(max_prompt_chars: int, max_images: int) -> Mapping[str, Kind]:
    bounded = {"prompt": texts(1, max_prompt_chars), "n": whole(1, max_images)}
    return OPENAI | ANSWER | OWN | PARAMS | SIZES | bounded


def read_fields(given: Mapping[str, Any], settings: ServerSettings) -> ImageFields:
    """The typed fields of a body that was decoded already, without its pictures. Null is "not given".

    Raises:
        ApiError: 400 with the field's name in ``param``.
    """
    fields = ImageFields()
    fill(fields, given, known_fields(settings), {*OPENAI, *ANSWER}, IMPOSSIBLE, IGNORED)
    fields.quality = str(given["quality"]) if isinstance(given.get("quality"), str) else "auto"
    _check(fields)
    return fields


def fill(
    fields: CommonFields,
    given: Mapping[str, Any],
    kinds: Mapping[str, Kind],
    openai: Collection[str],
    impossible: Mapping[str, str],
    ignored: Collection[str] = (),
) -> None:
    """Reads ``given`` into ``fields``.

    Args:
        fields: What is filled.
        given: A decoded body. Null is "not given".
        kinds: Every field that is read.
        openai: Those that are attributes of ``fields``; others are ours, or arguments of the pipeline.
        impossible: Names that can only be null, and why.
        ignored: Names of which any value is taken.

    Raises:
        ApiError: 400 with the field's name in ``param``.
    """
    sides: dict[str, int] = {}
    for name, value in given.items():
        if name in ignored or (name in impossible and value is None):
            continue
        if name in impossible:
            raise invalid(f"{name}: {impossible[name]}", name, "unsupported_parameter")
        if name not in kinds:
            raise unknown(name, {*kinds, *ignored})
        if value is None:
            continue
        found = kinds[name](name, value)
        if name in SIZES:
            sides[name] = found
        elif name in openai:
            setattr(fields, name, found)
        else:
            (fields.own if name in OWN else fields.params)[name] = found
    if not fields.prompt:
        raise invalid("prompt: must be given, and not empty", "prompt", "missing_required_parameter")
    if sides and fields.size is not None and sides != _sides(fields.size):
        raise invalid("size: give either size or width and height", "size")
    fields.params.update(sides or _sides(fields.size))
    fields.user = fields.safety_identifier or fields.user


def _sides(found: tuple[int, int] | None) -> dict[str, int]:
    return {"width": found[0], "height": found[1]} if found else {}


def _check(fields: ImageFields) -> None:
    if fields.output_format == "png" and fields.output_compression not in (None, 100):
        raise invalid(
            f"output_compression={fields.output_compression}: png loses nothing; use output_format webp or jpeg",
            "output_compression",
        )
    if fields.metadata and fields.output_format != "png":
        raise invalid(f"metadata=True: {fields.output_format} carries none here; use output_format png", "metadata")
    if fields.stream and fields.response_format == "url":
        raise invalid("response_format='url': a stream carries the images themselves; use b64_json", "response_format")


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
