"""How long the sound is that a pipeline makes where nobody says, and for how much of it one of its latents stands."""

from __future__ import annotations

import math
from typing import Any

from steploom.protocol.pipeline import SOUND
from steploom.weave import signatures
from steploom.worker.traits import products


def told(pipeline: Any, denoiser: Any) -> dict[str, Any]:
    """What :class:`~steploom.protocol.PipelineInfo` says of the length of sound, by field."""
    if products.makes(pipeline) != ["audios"]:
        return {}
    seconds, axis = latent(pipeline)
    return {"default_sound_s": default(pipeline, denoiser), "latent_sound_s": seconds, "latent_sound_axis": axis}


def latent(pipeline: Any) -> tuple[float, int]:
    """Seconds for each latent, and the axis along which they follow each other; 0 seconds where that is not known."""
    per_second = getattr(pipeline, "latents_per_second", None)  # ACE-Step
    if isinstance(per_second, float) and per_second > 0:
        return 1 / per_second, 1
    rate = products.sampling_rate(pipeline)
    hop = getattr(getattr(pipeline, "vae", None), "hop_length", None)  # Stable Audio
    if rate and isinstance(hop, int):
        return hop / rate, 2
    rates = getattr(getattr(getattr(pipeline, "vocoder", None), "config", None), "upsample_rates", None)  # AudioLDM
    factor = getattr(pipeline, "vae_scale_factor", None)
    if rate and rates and isinstance(factor, int):
        return math.prod(rates) * factor / rate, 2
    return 0.0, 2


def default(pipeline: Any, denoiser: Any) -> float | None:
    """Seconds of sound whose length is not given, as ``__call__`` or the model's own size say; None if neither does."""
    parameters = signatures.call_parameters(pipeline)
    for name in SOUND:
        value = parameters[name].default if name in parameters else None
        if isinstance(value, (int, float)) and value > 0:
            return float(value)
    size = getattr(getattr(denoiser, "config", None), "sample_size", None)
    return size * latent(pipeline)[0] or None if isinstance(size, int) else None
