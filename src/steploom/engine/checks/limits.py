"""How much one request may ask for: steps, images, frames, sound, tokens; the bounds are fields of ``EngineConfig``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sized
from typing import Any, cast

from steploom.config import EngineConfig
from steploom.engine.checks.arguments import STEP_LISTS
from steploom.engine.checks.counts import counts, pictures_in, told
from steploom.errors import InvalidRequest
from steploom.given import is_number
from steploom.media.pictures import leaves, shape_of
from steploom.protocol import PipelineInfo
from steploom.protocol.pictures import (
    FRAMES,
    LATENT_WINDOWS,
    WINDOWS,
    is_video,
    pictures_among,
    pictures_of_conditions,
)
from steploom.protocol.pipeline import SOUND
from steploom.protocol.windows import windows
from steploom.requests import DiffusionRequest

STEPS = "num_inference_steps"
"""How arguments end that say how many steps there are; cascades have one for each stage."""
STEPS_LIST = "num_inference_steps_list"
"""How arguments end that say so for several stages."""
LENGTHS = ("gen_length", "block_length")
"""Arguments that say how many tokens a text has, or a block of it, which is written as a whole."""
TEXTS = ("max_sequence_length", "tokenizer_max_length", "max_text_length", "max_lyric_length", "max_new_tokens",
         "prompt_max_new_tokens", "prompt_reps")  # fmt: skip
"""Arguments that say how many tokens a prompt is filled up to, or how many more of them are written for it."""
_OR_NONE = "audio_duration"
"""The one of them that may be 0 or less: then it is as long as the sound that is given."""
_SOUND_FROM = "audio_start_in_s"
_SILENCE = "silence_padding_duration"
_RATES = ("frame_rate", "fps")
"""Arguments that say how fast a video runs; its sound is as long as it is."""
_WITH_SOUND = {"enable_sound": False, "sample_audio": True}
"""Arguments that say whether it has any, and whether it does by default."""
_MORE_STEPS = ("max_post_steps", "jump_n_sample", "jump_length", "ar_step")
"""Further steps: of a block that has all its tokens, back and forth (RePaint), from frame to frame (SkyReels)."""


def check_limits(request: DiffusionRequest, info: PipelineInfo, config: EngineConfig) -> None:
    """Refuses a request for more than ``config`` allows; its counts are known to be integers.

    Raises:
        InvalidRequest: Names the field, how much it comes to, and the limit.
    """
    for field, steps in _steps(request, info):
        if steps > config.max_steps:
            said = f"{field}={steps}" if field.endswith((STEPS, *_MORE_STEPS)) else f"{field}: {steps} steps"
            raise InvalidRequest(f"{said}: at most {config.max_steps} (EngineConfig.max_steps)", field=field)
    _check_pictures(request, info, config)
    _check_images(request, info, config)
    _check_windows(request, info, config)
    _check_at_once(request, info, config)
    _check_sound(request, info, config)
    _check_sound_of_video(request, info, config)
    _check_tokens(request, info, config)


def _check_windows(request: DiffusionRequest, info: PipelineInfo, config: EngineConfig) -> None:
    """The steps of all windows of a video together, each of which takes all that are asked for."""
    made = windows(request.params, info)
    if made is not None and made.times * made.steps > config.max_steps:
        raise InvalidRequest(
            f"{STEPS}={made.steps}: {made.times * made.steps} steps in {made.times} windows of the video, at most "
            f"{config.max_steps} (EngineConfig.max_steps); give a shorter {made.frames} or a larger {made.size}",
            field=STEPS,
        )


def _check_pictures(request: DiffusionRequest, info: PipelineInfo, config: EngineConfig) -> None:
    """The pictures of each argument, be they read yet or not."""
    conditions = pictures_of_conditions(request.params)
    for name, value in (pictures_among(request.params, info) | conditions).items():
        count = sum(map(pictures_in, leaves(name, value)))
        bound = "max_frames" if is_video(name) or name in conditions else "max_images"
        if count > getattr(config, bound):
            raise InvalidRequest(
                f"{name}: {count} pictures, at most {getattr(config, bound)} of one request (EngineConfig.{bound})",
                field=name,
            )


def _check_images(request: DiffusionRequest, info: PipelineInfo, config: EngineConfig) -> None:
    """The images or videos of all prompts together, and the frames of all these videos."""
    said = counts(request, info)
    images = 1
    for count in said.values():
        images *= count
    if images > config.max_images:
        field = max(said, key=lambda name: said[name])
        raise InvalidRequest(
            f"{told(said)}: at most {config.max_images} images of one request (EngineConfig.max_images)", field=field
        )
    known = {parameter.name for parameter in info.parameters}
    for field in FRAMES:
        frames = request.params.get(field) or (field in known and info.default_frames) or 1
        if isinstance(frames, int) and frames * images > config.max_frames:
            raise InvalidRequest(
                f"{told({field: frames} | said)}: at most {config.max_frames} frames of one request "
                "(EngineConfig.max_frames)",
                field=field,
            )


def _check_at_once(request: DiffusionRequest, info: PipelineInfo, config: EngineConfig) -> None:
    """The frames of a window of a video, which is made as a whole, and those of latents that are given."""
    frames = {name: request.params.get(name) for name in WINDOWS}
    for name in LATENT_WINDOWS:
        latent = request.params.get(name)
        frames[name] = None if latent is None else (latent - 1) * info.frame_multiple + 1
    said = {name: f"{name}={request.params.get(name)}" for name in frames}
    shape = shape_of(request.params.get("latents"))
    if shape is not None and len(shape) == 5:
        rows, latent = shape[0], shape[info.latent_axes[0]]
        frames["latents"] = rows * ((latent - 1) * info.frame_multiple + 1)
        said["latents"] = f"latents of {list(shape)}"
    for name, count in frames.items():
        if count is not None and count > config.max_frames:
            raise InvalidRequest(
                f"{said[name]}, which make {count} frames: at most {config.max_frames} frames of one request "
                "(EngineConfig.max_frames)",
                field=name,
            )


def _check_sound(request: DiffusionRequest, info: PipelineInfo, config: EngineConfig) -> None:
    """The seconds of all waveforms."""
    said, params = counts(request, info), request.params
    for name in SOUND:
        seconds: Any = _seconds(name, request, info)
        start: Any = params.get(_SOUND_FROM) if name == "audio_end_in_s" else None
        if not is_number(seconds) or not (start is None or is_number(start)):
            continue
        silence: Any = params.get(_SILENCE) if name == "duration" else None
        length = seconds - (start or 0) + (silence if is_number(silence) else 0)
        if length <= 0 and name.endswith("_in_s"):
            raise InvalidRequest(f"{name}={seconds}: must be greater than {start or 0}, where it begins", field=name)
        if length * math.prod(said.values()) > config.max_sound_s:
            besides = {_SOUND_FROM: start, _SILENCE: silence}
            named = {name: seconds} | {other: value for other, value in besides.items() if value is not None} | said
            raise InvalidRequest(
                f"{told(named)}: at most {config.max_sound_s:g} seconds of sound of one request "
                "(EngineConfig.max_sound_s)",
                field=name,
            )


def _seconds(name: str, request: DiffusionRequest, info: PipelineInfo) -> Any:
    """What an argument says of the length of sound; one that says nothing leaves it to a sound, or the pipeline."""
    params = request.params
    seconds: Any = params.get(name)
    none = is_number(seconds) and seconds <= 0 and name == _OR_NONE
    if (seconds is not None and not none) or not any(parameter.name == name for parameter in info.parameters):
        return seconds
    if any(is_number(params.get(other)) for other in SOUND if other != name):
        return None  # which says it
    sound = shape_of(params.get("src_audio")) if name in params else None
    return sound[-1] / info.sampling_rate if sound and info.sampling_rate else info.default_sound_s


def _check_sound_of_video(request: DiffusionRequest, info: PipelineInfo, config: EngineConfig) -> None:
    """The seconds of the sound of all videos, which are as long as their frames last."""
    known, params = {parameter.name for parameter in info.parameters}, request.params
    if "audios" not in info.makes or not all(params.get(name, on) for name, on in _WITH_SOUND.items() if name in known):
        return
    name = next((name for name in _RATES if name in known), None)
    field = next((field for field in FRAMES if field in known), None)
    if name is None or field is None:
        return
    rate: Any = params.get(name) or info.frame_rate
    frames: Any = params.get(field) or info.default_frames
    if not (is_number(rate) and is_number(frames) and rate > 0):
        return
    times = counts(request, info)
    length = frames / rate * math.prod(times.values())
    if length > config.max_sound_s:
        said = told({name: rate, field: frames} | times)
        raise InvalidRequest(
            f"{said}: {length:g} seconds of sound, at most {config.max_sound_s:g} of one request "
            "(EngineConfig.max_sound_s)",
            field=name if params.get(name) else field,
        )


def _check_tokens(request: DiffusionRequest, info: PipelineInfo, config: EngineConfig) -> None:
    """The tokens of each text, of which there are as many blocks as it is long; a block of its own length is memory."""
    asked = {name: request.params.get(name) for name in (*LENGTHS, *TEXTS)}
    if info.default_length is not None:
        asked[LENGTHS[0]] = asked[LENGTHS[0]] or info.default_length
    for name, tokens in asked.items():
        if tokens is not None and tokens > config.max_tokens:
            raise InvalidRequest(
                f"{name}={tokens}: at most {config.max_tokens} tokens of one text (EngineConfig.max_tokens)", field=name
            )


def _steps(request: DiffusionRequest, info: PipelineInfo) -> Iterator[tuple[str, int]]:
    """All that says how many steps there will be, and how many that is."""
    listed = any(isinstance(request.params.get(name), Sized) for name in STEP_LISTS)
    yield STEPS, request.params.get(STEPS) or (not listed and info.default_steps) or 1
    for name, value in request.params.items():
        if (name.endswith(STEPS) or name in _MORE_STEPS) and isinstance(value, int):
            yield name, value
        elif name.endswith(STEPS_LIST) and isinstance(value, (list, tuple)):
            yield name, sum(one for one in cast("list[Any]", value) if isinstance(one, int))
        elif name.endswith(STEP_LISTS) and isinstance(value, Sized):
            yield name, len(value)
