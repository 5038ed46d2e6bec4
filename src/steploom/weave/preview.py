"""Previews: a small picture of the estimate of the finished latents, for pipelines that decode latents with a VAE.

Small latents are decoded by the VAE itself; larger ones by a linear map from latent channels to RGB that is fitted once
from the model's own VAE (the idea of ComfyUI's ``latent_rgb_factors``, learned instead of tabulated).
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

_DECODED_PIXELS = 32 * 32
_FIT_SIZE = 8


class Previewer:
    """Makes previews for one pipeline.

    Args:
        pipeline: The user's pipeline; its VAE is used on the hub's thread, between module calls.
    """

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._vae = getattr(pipeline, "vae", None)
        self._rgb: torch.Tensor | None = None

    def picture(self, latents: Any, height: int | None, width: int | None) -> Image.Image | None:
        """A picture of ``latents [rows, ...]`` (the first row), None where the layout is unknown."""
        if self._vae is None or not isinstance(latents, torch.Tensor):
            return None
        latents = self._unpacked(latents, height, width)
        if latents is None or latents.ndim != 4:
            return None
        with torch.no_grad():
            small = latents.shape[-1] * latents.shape[-2] <= _DECODED_PIXELS
            pixels = self._decode(latents[:1]) if small else self._project(latents[:1])
        array = ((pixels[0].float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return Image.fromarray(array.permute(1, 2, 0).cpu().numpy())

    def _unpacked(self, latents: torch.Tensor, height: int | None, width: int | None) -> torch.Tensor | None:
        """Packed latents (Flux, Qwen-Image) as ``[rows, channels, height, width]``; of a video its middle frame."""
        unpack = getattr(self._pipeline, "_unpack_latents", None)
        if latents.ndim == 3 and unpack is not None:
            factor = getattr(self._pipeline, "vae_scale_factor", 8)
            default = getattr(self._pipeline, "default_sample_size", 64) * factor
            latents = unpack(latents, height or default, width or default, factor)
        if latents.ndim == 5:
            latents = latents[:, :, latents.shape[2] // 2]
        return latents

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """``[rows, 3, H, W]`` in -1..1 from ``[rows, channels, h, w]``, as diffusers' pipelines scale them."""
        vae: Any = self._vae
        config = vae.config
        latents = latents.to(vae.dtype)
        if getattr(config, "latents_mean", None) is not None:
            shape = (1, -1, 1, 1)
            mean = torch.tensor(config.latents_mean, device=latents.device, dtype=latents.dtype).view(shape)
            std = torch.tensor(config.latents_std, device=latents.device, dtype=latents.dtype).view(shape)
            latents = latents * std + mean
        else:
            latents = latents / (getattr(config, "scaling_factor", None) or 1.0)
            latents = latents + (getattr(config, "shift_factor", None) or 0.0)
        video = "3D" in type(vae).__name__ or "Wan" in type(vae).__name__ or "Qwen" in type(vae).__name__
        pixels = vae.decode(latents.unsqueeze(2) if video else latents, return_dict=False)[0]
        return pixels[:, :, 0] if video else pixels

    def _project(self, latents: torch.Tensor) -> torch.Tensor:
        """``[rows, 3, h, w]``: one pixel per latent."""
        if self._rgb is None:
            self._rgb = self._fit(latents)
        ones = torch.ones_like(latents[:, :1])
        return torch.einsum("oc,bchw->bohw", self._rgb, torch.cat([latents, ones], dim=1).float())

    def _fit(self, like: torch.Tensor) -> torch.Tensor:
        """The linear map ``[3, channels + 1]`` that explains best how the VAE decodes flat patches."""
        noise = torch.Generator().manual_seed(0)
        patches = torch.randn(64, like.shape[1], 1, 1, generator=noise).expand(-1, -1, _FIT_SIZE, _FIT_SIZE)
        patches = patches.to(like.device, like.dtype)
        colours = self._decode(patches).float().mean(dim=(2, 3))
        inputs = torch.cat([patches[:, :, 0, 0].float(), torch.ones(64, 1, device=like.device)], dim=1)
        return torch.linalg.lstsq(inputs.cpu(), colours.cpu()).solution.T.to(like.device)
