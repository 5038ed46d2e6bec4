"""The linear map from latents to colours that explains best how a model's own VAE decodes.

ComfyUI tabulates such maps as ``latent_rgb_factors``; here they are fitted when the model is loaded, on the VAE's own
encodings of soft random pictures: latents of flat noise would be nothing like what the model makes.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch.nn import functional

from steploom.weave import signatures

_PICTURES = 8
_SIDE = 8
_MOST_PIXELS = 256
_RIDGE = 1e-3
FAULTS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError, NotImplementedError)
"""What a VAE raises at an input that it was not made for."""


class LatentRGB:
    """A linear map from one position's latent channels to a colour.

    Attributes:
        weights: ``[3, channels + 1]``, the constant last.
    """

    def __init__(self, weights: torch.Tensor) -> None:
        self.weights = weights

    def picture(self, latents: torch.Tensor) -> torch.Tensor:
        """``[3, h, w]`` in -1..1 from latents as the VAE takes them, ``[channels, h, w]``."""
        weights = self.weights = self.weights.to(latents.device)
        return torch.einsum("oc,chw->ohw", weights[:, :-1], latents.float()) + weights[:, -1, None, None]

    def fits(self, channels: int) -> bool:
        """Whether it maps latents of so many channels."""
        return self.weights.shape[1] == channels + 1


def fit(vae: Any, scale: int) -> LatentRGB | None:
    """The map of a VAE; None where it decodes no pictures, or none of what it encodes itself.

    Args:
        vae: Decodes latents ``[rows, channels, h, w]`` or ``[rows, channels, frames, h, w]`` to pixels in -1..1.
        scale: Pixels per latent, along a side.
    """
    dtype = getattr(vae, "dtype", torch.float32)
    if dtype == torch.float16 and getattr(vae.config, "force_upcast", False):
        vae, dtype = copy.deepcopy(vae).float(), torch.float32  # in float16 it overflows; dropped after the fit
    side = max(4 * _SIDE, min(_SIDE * scale, _MOST_PIXELS))
    pictures = _pictures(side).to(getattr(vae, "device", "cpu"), dtype)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for video in (True, False) if is_video(vae) else (False, True):
            for channels in (3, 4):
                try:
                    return _fitted(vae, pictures, channels, video=video)
                except FAULTS:
                    continue
    return None


def _fitted(vae: Any, pictures: torch.Tensor, channels: int, *, video: bool) -> LatentRGB | None:
    inputs = functional.pad(pictures, (0, 0, 0, 0, 0, channels - 3), value=1.0)  # the fourth channel is opacity
    latents = _latents(vae.encode(inputs.unsqueeze(2) if video else inputs))
    pixels = tensor_of(vae.decode(latents))
    if video:
        latents, pixels = latents[:, :, 0], pixels[:, :, 0]
    if pixels.shape[1] not in (3, 4):
        return None
    pixels = functional.adaptive_avg_pool2d(pixels[:, :3].float(), (latents.shape[-2], latents.shape[-1]))
    # Positions at the border are padded ones: not what the rest of a picture is made of.
    cut = (slice(None), slice(None), slice(1, -1), slice(1, -1)) if min(latents.shape[-2:]) > 3 else slice(None)
    x, y = (value[cut].float().movedim(1, -1).flatten(0, 2).cpu() for value in (latents, pixels))
    x = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    size = x[:, :-1].pow(2).mean().clamp(min=1e-12)
    ridge = torch.eye(x.shape[1]) * _RIDGE * len(x) * size
    ridge[-1, -1] = 0
    weights = torch.linalg.solve(x.T @ x + ridge, x.T @ y).T
    return LatentRGB(weights.contiguous()) if bool(torch.isfinite(weights).all()) else None


def _pictures(side: int) -> torch.Tensor:
    """Soft random pictures ``[_PICTURES, 3, side, side]`` in -1..1, of coarse and of fine patches of colour."""
    noise = torch.Generator().manual_seed(0)
    grids = [torch.rand(_PICTURES // 4, 3, n, n, generator=noise) * 2 - 1 for n in (1, 2, 4, 8)]
    return torch.cat([functional.interpolate(grid, size=(side, side), mode="bilinear") for grid in grids])


def _latents(encoded: Any) -> torch.Tensor:
    encoded = encoded[0] if isinstance(encoded, tuple) else encoded
    distribution = getattr(encoded, "latent_dist", encoded)
    if hasattr(distribution, "mode"):
        return distribution.mode()
    return tensor_of(next((getattr(encoded, n) for n in ("latents", "latent") if hasattr(encoded, n)), encoded))


def tensor_of(result: Any) -> torch.Tensor:
    """The tensor that a VAE returned, however it wraps it."""
    if isinstance(result, torch.Tensor):
        return result
    return result[0] if isinstance(result, tuple) else result.sample


def is_video(vae: Any) -> bool:
    """Whether a VAE takes latents with a dimension of frames."""
    deep = any(parameter.ndim == 5 for parameter in vae.parameters())
    return deep and not signatures.takes(vae.decode, "num_frames")


def scale_of(pipeline: Any, vae: Any) -> int:
    """Pixels per latent, along a side."""
    for value in (
        getattr(vae.config, "scale_factor_spatial", None),
        getattr(vae, "spatial_compression_ratio", None),
        getattr(vae.config, "spatial_compression_ratio", None),
        getattr(pipeline, "vae_scale_factor_spatial", None),
        getattr(pipeline, "vae_scale_factor", None),
    ):
        if isinstance(value, (int, float)) and value >= 1:
            return math.ceil(value)
    return 8
