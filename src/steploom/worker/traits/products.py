"""What a pipeline makes: images, videos, sound or text, and how fast they run."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from steploom.protocol.pictures import FRAMES
from steploom.requests import DiffusionRequest
from steploom.weave import signatures, untyped

_FIELDS = {
    **dict.fromkeys(("images", "image", "prediction", "rgb"), "images"),
    **dict.fromkeys(("frames", "videos", "video"), "videos"),
    **dict.fromkeys(("audios", "audio", "sound"), "audios"),
    **dict.fromkeys(("texts", "text"), "text"),
}
"""What fields of outputs hold, by their names."""

_RATE_NAMES = ("frame_rate", "fps")
_COMPRESSION = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio", "vae_temporal_scale_factor")
"""Where pipelines keep how many frames become one in the latents; the first frame stands for itself."""
_SAMPLING = (
    ("vocoder", "output_sampling_rate"), ("vocoder", "sampling_rate"), ("sound_tokenizer", "sampling_rate"),
    ("audio_vae", "sample_rate"), ("vae", "sampling_rate"), ("vae", "sample_rate"),
)  # fmt: skip
"""Which component's config says how many samples a second has, the last one in the chain first."""


def makes(pipeline: Any) -> list[str]:
    """What the pipeline makes, by the fields of the output classes that its module knows; empty if none tells."""
    kinds: list[str] = []
    for cls in type(pipeline).__mro__:
        module = sys.modules.get(cls.__module__)
        known = list(vars(module).items()) if module is not None else []
        outputs = [value for name, value in known if name.endswith("Output") and untyped.is_output(value)]
        outputs = [value for value in outputs if value.__module__.startswith(_home(cls))]
        kinds += [_FIELDS[field.name] for one in outputs for field in dataclasses.fields(one) if field.name in _FIELDS]
        if outputs:  # of embeddings, it may be; the classes above have others
            break
    return list(dict.fromkeys(kinds))


def _home(cls: type) -> str:
    """The package that pipelines' output classes come from; a module's other outputs are those of models."""
    return "diffusers.pipelines" if cls.__module__.startswith("diffusers.") else cls.__module__.partition(".")[0]


def frame_rate(pipeline: Any) -> float | None:
    """Frames per second that the pipeline assumes if it is not told."""
    parameters = signatures.call_parameters(pipeline)
    defaults = (parameters[name].default for name in _RATE_NAMES if name in parameters)
    return next(filter(None, map(_rate, defaults)), None)


def asked_frame_rate(request: DiffusionRequest) -> float | None:
    """Frames per second that the request asks for."""
    return next(filter(None, (_rate(request.params.get(name)) for name in _RATE_NAMES)), None)


def default_frames(pipeline: Any) -> int | None:
    """Frames of a video whose length is not given."""
    parameters = signatures.call_parameters(pipeline)
    defaults = (parameters[name].default for name in FRAMES if name in parameters)
    return next((value for value in defaults if _rate(value) and isinstance(value, int)), None)


def frame_multiple(pipeline: Any) -> int:
    """What ``num_frames - 1`` should be a multiple of."""
    return next((int(rate) for name in _COMPRESSION if (rate := _rate(getattr(pipeline, name, None)))), 1)


def sampling_rate(pipeline: Any) -> int | None:
    """Samples per second of the pipeline's sound; None where it makes none."""
    for component, name in _SAMPLING:
        value = _rate(getattr(getattr(getattr(pipeline, component, None), "config", None), name, None))
        if value is not None:
            return int(value)
    return None


def _rate(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0 else None
