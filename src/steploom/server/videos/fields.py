"""The fields of a request for a video, and the length that they come to."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

from steploom.errors import InvalidRequest
from steploom.media import rates
from steploom.protocol import PipelineInfo
from steploom.protocol.pictures import FRAMES
from steploom.server import fields as common
from steploom.server.errors import invalid
from steploom.server.fields import CommonFields, fill
from steploom.server.kinds import FormText, Kind, number, scale, seconds, texts, whole
from steploom.server.settings import ServerSettings

MAX_FPS = 240
MAX_SECONDS = 24 * 3600
_RATES = ("frame_rate", "fps")
"""What pipelines call the frames per second, where they want to know."""


@dataclasses.dataclass(kw_only=True)
class VideoFields(CommonFields):
    """A request for a video. None is "not given".

    Attributes:
        seconds: Its length, as text; ``num_frames`` goes before it.
        num_frames: Its length.
        fps: Frames per second.
    """

    seconds: str | None = None
    num_frames: int | None = None
    fps: float | None = None


_DECIMAL = r"[0-9]{1,9}(\.[0-9]{1,9})?"


def _length(name: str, value: Any) -> str:
    """A number of seconds, as the text that OpenAI has it in."""
    if isinstance(value, str) and not re.fullmatch(_DECIMAL, value):
        raise invalid(f"{name}={value!r:.80}: must be a number of seconds", name)
    found = seconds(name, FormText(value) if isinstance(value, str) else value)
    if found > MAX_SECONDS:
        raise invalid(f"{name}={value!r:.80}: must be at most {MAX_SECONDS}", name)
    return str(value) if isinstance(value, str) else f"{found:g}"


def _fps(name: str, value: Any) -> float:
    found = number(name, value)
    if not rates.SLOWEST <= found <= MAX_FPS:
        raise invalid(f"{name}={value!r:.80}: must be from {rates.SLOWEST} to {MAX_FPS}", name)
    return found


length = Kind(
    _length,
    {"anyOf": [{"type": "string", "pattern": f"^{_DECIMAL}$"}, {**seconds.schema, "maximum": MAX_SECONDS}]},
)
"""Seconds, as a number or as its text."""

OPENAI: dict[str, Kind] = {
    **{name: common.OPENAI[name] for name in ("prompt", "model", "size", "user", "safety_identifier")},
    "seconds": length,
    "num_frames": whole(1),
    "fps": Kind(_fps, {"type": "number", "minimum": rates.SLOWEST, "maximum": MAX_FPS}),
}
"""Fields of OpenAI's, and of the video's length, by name."""

PARAMS: dict[str, Kind] = {**common.PARAMS, "guidance_scale_2": scale}
"""Arguments of the pipeline."""

IMPOSSIBLE: dict[str, str] = dict.fromkeys(("image", "image_reference"), "is called input_reference here")
"""Fields that can only be null, and why."""


def known_fields(settings: ServerSettings) -> Mapping[str, Kind]:
    """Every field that is read, with the bounds of this server."""
    return _known(settings.max_prompt_chars)


@functools.lru_cache(maxsize=16)
def _known(max_prompt_chars: int) -> Mapping[str, Kind]:
    return OPENAI | common.OWN | PARAMS | common.SIZES | {"prompt": texts(1, max_prompt_chars)}


def read_fields(given: Mapping[str, Any], settings: ServerSettings) -> VideoFields:
    """The typed fields of a decoded body, without its picture. Null, and nothing at all in a form, is "not given".

    Raises:
        ApiError: 400 with the field's name in ``param``.
    """
    fields = VideoFields()
    there = {
        name: value
        for name, value in given.items()
        if name.endswith("prompt") or not (isinstance(value, FormText) and value == "")
    }
    fill(fields, there, known_fields(settings), OPENAI, IMPOSSIBLE)
    if fields.seconds is not None and fields.num_frames is not None:
        raise invalid("seconds: give either seconds or num_frames; fps says how fast they run", "seconds")
    return fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class Length:
    """How long a video will be.

    Attributes:
        seconds: As asked for, or else what the frames come to; empty where nobody knows before it is made.
        frames: Frames, None where nobody knows.
        fps: Frames per second.
        arguments: What the pipeline is told of it.
    """

    seconds: str
    frames: int | None
    fps: float
    arguments: dict[str, Any]


def length_of(fields: VideoFields, info: PipelineInfo) -> Length:
    """The length that was asked for, in frames that the pipeline can make: the nearest number of them.

    Raises:
        ApiError: 400: the pipeline's videos have a length of their own.
    """
    known = {parameter.name for parameter in info.parameters}
    fps = fields.fps or info.frame_rate or rates.DEFAULT_FRAME_RATE
    name = next((name for name in FRAMES if name in known or not known), None)
    frames, said = fields.num_frames, "num_frames"
    if fields.seconds is not None:
        said, frames = "seconds", nearest(float(fields.seconds) * fps, info.frame_multiple)
    if frames is not None and name is None:
        raise invalid(f"{said}: {info.pipeline_class} makes videos of a length of its own; leave it out", said)
    arguments: dict[str, Any] = {} if frames is None or name is None else {name: frames}
    rate = next((rate for rate in _RATES if rate in known), None)
    if rate is not None and fields.fps is not None:
        arguments[rate] = int(fps) if fps.is_integer() else fps
    frames = frames or info.default_frames
    seconds = fields.seconds or ("" if frames is None else seconds_of(frames, fps))
    return Length(seconds=seconds, frames=frames, fps=fps, arguments=arguments)


def nearest(frames: float, multiple: int) -> int:
    """The number nearest to ``frames`` that is one more than a multiple of ``multiple``; at least 1."""
    return max(1, 1 + multiple * round((frames - 1) / multiple)) if multiple > 1 else max(1, round(frames))


def seconds_of(frames: int, fps: float) -> str:
    """The length of so many frames, as text."""
    return f"{round(frames / fps, 3):g}"


def param_of(error: InvalidRequest, fields: VideoFields) -> str | None:
    """What the client called the field that the engine refused."""
    if error.field in ("width", "height") and fields.size is not None:
        return "size"
    if error.field in FRAMES:
        return "seconds" if fields.seconds is not None else "num_frames"
    if error.field in _RATES:
        return "fps"
    return "input_reference" if error.field == "image" else error.field
