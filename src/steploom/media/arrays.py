"""Outputs in every form that pipelines give them, in one: frames as bytes, waves as floats, pictures as PIL's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from steploom.errors import ConfigError

_COLOURS = (1, 3, 4)
_CHANNELS = 8
"""More than these is no sound's number of channels, but its length."""
_FRAME, _VIDEO, _VIDEOS = 3, 4, 5
"""Dimensions of one frame, of a video, of several."""


def array(value: Any) -> Any:
    """``value`` as a numpy array, floats as float32; tensors come to the host."""
    import numpy

    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float().numpy() if value.is_floating_point() else value.numpy()
    value = numpy.asarray(value)
    return value.astype(numpy.float32) if value.dtype.kind == "f" else value


def frames_of(videos: Any) -> list[list[Any]]:
    """Videos as lists of frames, each ``[height, width, 3]`` of uint8.

    Args:
        videos: PIL images in lists of lists, or floats or bytes as an array or tensor ``[videos, frames, height, width,
            channels]``, ``[videos, frames, channels, height, width]`` or ``[videos, channels, frames, height, width]``;
            floats in 0..1, or in -1..1 if any is negative. One video alone is taken too, as is a list of any of these.

    Raises:
        ConfigError: It is none of these.
    """
    if isinstance(videos, (list, tuple)):
        entries = list(cast("Sequence[Any]", videos))
        if entries and all(_dimensions(entry) <= _FRAME and not isinstance(entry, (list, tuple)) for entry in entries):
            return [[_bytes(array(entry)) for entry in entries]]  # the frames of one video
        return [video for entry in entries for video in frames_of(entry)]
    values = array(videos)
    if values.ndim == _VIDEO:
        values = values[None]
    if values.ndim != _VIDEOS:
        raise ConfigError(f"a video of shape {values.shape}: must be [videos, frames, height, width, channels]")
    if values.shape[-1] not in _COLOURS:
        axis = 2 if values.shape[2] in _COLOURS else 1
        if values.shape[axis] not in _COLOURS:
            raise ConfigError(f"a video of shape {values.shape}: these are latents; leave output_type as it is")
        values = values.swapaxes(1, 2) if axis == 1 else values
        values = values.transpose(0, 1, 3, 4, 2)
    return [list(video) for video in _bytes(values)]


def pictures_of(images: Any) -> list[Any]:
    """Images as a list of PIL's, whatever lists they stand in.

    Raises:
        ConfigError: There is none, or something else among them.
    """
    from PIL import Image

    found: list[Any] = []
    pending = [images]
    while pending:
        value = pending.pop(0)
        if isinstance(value, Image.Image):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            pending[:0] = cast("list[Any]", value)
        elif _dimensions(value) == _VIDEO:
            found += map(Image.fromarray, _stack(array(value)))
        elif _dimensions(value) >= _FRAME:
            found += [Image.fromarray(frame) for video in frames_of(value) for frame in video]
        else:
            raise ConfigError(f"the pipeline made {type(value).__name__} where an image was expected")
    if not found:
        raise ConfigError("the pipeline made no image")
    return found


def _stack(values: Any) -> list[Any]:
    """Images ``[images, height, width, channels]`` or ``[images, channels, height, width]``, as frames are."""
    if values.shape[-1] not in _COLOURS:
        if values.shape[1] not in _COLOURS:
            raise ConfigError(f"images of shape {values.shape}: these are latents; leave output_type as it is")
        values = values.transpose(0, 2, 3, 1)
    return list(_bytes(values))


def waves_of(audios: Any) -> list[Any]:
    """Sounds as a list of waves ``[channels, samples]`` in -1..1.

    Args:
        audios: Arrays or tensors ``[sounds, samples]``, ``[sounds, channels, samples]``, or a list of ``[samples]``,
            ``[channels, samples]`` or ``[samples, channels]``.

    Raises:
        ConfigError: It is none of these.
    """
    if isinstance(audios, (list, tuple)):
        return [_wave(array(one)) for one in cast("Sequence[Any]", audios)]
    values = array(audios)
    return [_wave(values)] if values.ndim == 1 else [_wave(one) for one in values]


def _wave(wave: Any) -> Any:
    import numpy

    if wave.dtype.kind in "iu":
        wave = wave / numpy.iinfo(wave.dtype).max
    wave = wave[None] if wave.ndim == 1 else wave
    if wave.ndim != 2 or min(wave.shape) > _CHANNELS:
        raise ConfigError(f"a sound of shape {wave.shape}: must be [channels, samples]")
    wave = wave if wave.shape[0] <= _CHANNELS else wave.T
    return numpy.clip(numpy.nan_to_num(wave), -1.0, 1.0).astype(numpy.float32)


def _dimensions(value: Any) -> int:
    return len(value.shape) if hasattr(value, "shape") else 0


def _bytes(values: Any) -> Any:
    """``[..., height, width, 3]`` as uint8; a frame's channels may come first, and be one or four."""
    import numpy

    if values.ndim == _FRAME and values.shape[-1] not in _COLOURS and values.shape[0] in _COLOURS:
        values = values.transpose(1, 2, 0)
    elif values.ndim < _FRAME:
        values = values[..., None]
    if values.dtype != numpy.uint8:
        values = numpy.nan_to_num(values.astype(numpy.float32))
        values = (values + 1) / 2 if values.size and values.min() < -1e-3 else values
        values = (values.clip(0, 1) * 255).round().astype(numpy.uint8)
    if values.shape[-1] == 1:
        return values.repeat(3, axis=-1)
    return numpy.ascontiguousarray(values[..., :3])
