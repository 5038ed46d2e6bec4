"""Previews: a small picture of the estimate of the finished image, or of a video's middle frame.

What the pipeline would hand to its decoder is found by running the rest of its own code
(:mod:`~steploom.weave.aside.rest`). It becomes a picture in the first of three ways that there is:

1. a tiny autoencoder: the one that was given, or on small latents the model's own VAE if it is as small as one;
2. a linear map from latents to colours, fitted from the model's own VAE at load (:mod:`~steploom.weave.previews.rgb`);
3. the VAE, on small latents.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image

from steploom.errors import ConfigError
from steploom.weave import untyped
from steploom.weave.aside.rest import decoder_call
from steploom.weave.calls import ModuleCall
from steploom.weave.modules.shared import Target, isolate
from steploom.weave.noise.observed import StepEnd
from steploom.weave.previews.rgb import FAULTS, LatentRGB, fit, scale_of, tensor_of
from steploom.weave.program import Program

log = logging.getLogger(__name__)

TINY_PARAMETERS = 2_000_000
"""A decoder of no more parameters is a tiny autoencoder itself (TAESD's has 1.2 million)."""

SMALL_LATENTS = 32 * 32
"""Positions that a VAE decodes for a preview, if it is tiny or no linear map could be fitted."""

_TOKENS, _IMAGE, _VIDEO = 3, 4, 5
"""Dimensions of latents: ids of a codebook, an image's, with frames."""

_PIXELS = (3, 6)
"""Channels of what is pixels already, the second with a learned variance."""


_TINY = "AutoencoderTiny"
_CHANNELS = ("latent_channels", "z_dim")
"""What VAEs call the channels of their latents."""


def load_tiny(name: str | None, pipeline: Any, *, local_files_only: bool = False) -> Any:
    """The tiny autoencoder of ``EngineConfig.preview_vae``, where and as the pipeline's VAE is; None for None.

    Raises:
        ConfigError: It cannot be loaded.
    """
    if name is None:
        return None
    vae = next((module for module in untyped.modules_of(pipeline).values() if callable(_decode(module))), None)
    try:
        tiny = untyped.load_component(name, getattr(vae, "dtype", torch.float32), local_files_only=local_files_only)
        if type(tiny).__name__ != _TINY:
            raise ValueError(f"it is a {type(tiny).__name__}")
    except (OSError, ValueError, RuntimeError) as fault:
        raise ConfigError(
            f"preview_vae={name!r}: no folder or hub id of an {_TINY} ({str(fault).splitlines()[0]})"
        ) from fault
    channels = _latent_channels(vae)
    if channels not in (None, tiny.config.latent_channels):
        raise ConfigError(
            f"preview_vae={name!r}: is for latents of {tiny.config.latent_channels} channels, and those of "
            f"{type(vae).__name__} have {channels}; give one for this model, or leave it out"
        )
    return tiny.eval().to(getattr(pipeline, "_execution_device", "cpu"))


def _latent_channels(vae: Any) -> int | None:
    """Of the latents that a VAE takes; None where its settings do not say."""
    found = (getattr(getattr(vae, "config", None), field, None) for field in _CHANNELS)
    return next((channels for channels in found if isinstance(channels, int)), None)


class Previewer:
    """Makes previews for one pipeline.

    Args:
        pipeline: The user's pipeline; its VAE is used on the hub's thread, between module calls.
        tiny: A tiny autoencoder for its latents in the model's own scaling; None where there is none.
        settle: Waits until the VAE is not in use.
    """

    def __init__(self, pipeline: Any, tiny: Any = None, settle: Callable[[], None] = lambda: None) -> None:
        self._pipeline = pipeline
        self._tiny = tiny
        self._settle = settle
        self._maps: dict[str, LatentRGB] = {}
        self._silent: set[str] = set()
        self._decoders = {name: m for name, m in untyped.modules_of(pipeline).items() if callable(_decode(m))}
        self._small = {name for name, module in self._decoders.items() if _is_tiny(module)}
        if tiny is None:
            for name, module in self._decoders.items():
                self._prepare(name, getattr(module, "_orig_mod", module))

    def _prepare(self, name: str, vae: Any) -> None:
        """Fits the linear map of a VAE: with a clone, since it may keep on itself what it has seen."""
        if hasattr(vae, "config"):
            found = fit(isolate(vae), scale_of(self._pipeline, vae))
            if found is not None:
                self._maps[name] = found

    def picture(self, program: Program) -> torch.Tensor | None:
        """A picture of the step that ``program`` stands in, on the device, where it has one.

        Returns:
            ``[height, width, 3]`` as uint8, of the first row; None where the latents are no picture. What cannot be
            shown is logged once per kind of fault: a missing preview is no reason to fail.
        """
        end = program.step_end
        assert end is not None
        try:
            with torch.no_grad():
                pixels = self._pixels(program, end)
        except Exception as fault:  # noqa: BLE001 - whatever a pipeline's code or a VAE raises
            name = type(fault).__name__
            if name not in self._silent:
                self._silent.add(name)
                log.warning("%s has no previews: %s: %s", type(self._pipeline).__name__, name, fault)
            return None
        if pixels is None:
            return None
        return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)

    def _pixels(self, program: Program, end: StepEnd) -> torch.Tensor | None:
        """``[3, height, width]`` in -1..1."""
        latents = end.estimate()
        if not isinstance(latents, torch.Tensor) or latents.ndim < _TOKENS:
            return None
        call = self._decoder_call(program, end, latents) if self._decoders else None
        if call is None:
            return latents[0, :3] if latents.ndim == _IMAGE and latents.shape[1] in _PIXELS else None
        vae = getattr(call.target.module, "_orig_mod", call.target.module)
        one = _Decoded(call, vae)
        tokens = not one.latents.is_floating_point()
        if not _shows(vae) or one.latents.ndim not in ((_TOKENS,) if tokens else (_IMAGE, _VIDEO)):
            return None
        if self._tiny is not None and not tokens:
            return self._by_tiny(one.frame, vae)
        small = one.frame.shape[-1] * one.frame.shape[-2] <= SMALL_LATENTS
        own_tiny, rgb = call.target.name in self._small, self._maps.get(call.target.name)
        if rgb is not None and rgb.fits(one.frame.shape[0]) and not tokens and not (small and own_tiny):
            return rgb.picture(one.frame)
        if not (small or own_tiny):
            return None
        self._settle()
        return one.decode()

    def _decoder_call(self, program: Program, end: StepEnd, latents: torch.Tensor) -> ModuleCall | None:
        try:
            return decoder_call(program, end.result_with(latents.clone()))
        except Exception as fault:  # whatever the pipeline's code raises
            guess = self._plain_call(latents)
            if guess is None:
                raise
            log.debug("the preview takes the latents as they are, since %s: %s", type(fault).__name__, fault)
            return guess

    def _plain_call(self, latents: torch.Tensor) -> ModuleCall | None:
        """The call of a VAE that takes ``latents`` as they are but for their scaling; None where they do not fit it."""
        name, module = next(iter(self._decoders.items()))
        config = getattr(module, "config", None)
        channels = [getattr(config, field, None) for field in _CHANNELS]
        if latents.ndim not in (_IMAGE, _VIDEO) or latents.shape[1] not in channels:
            return None
        return ModuleCall(Target(name, "decode", module, ("preview", name)), (scaled_for_vae(latents, config),), {})

    def _by_tiny(self, frame: torch.Tensor, vae: Any) -> torch.Tensor:
        tiny = self._tiny
        latents = scaled_for_model(frame, vae.config) / (tiny.config.scaling_factor or 1.0)
        latents = latents + (getattr(tiny.config, "shift_factor", None) or 0.0)
        return tensor_of(tiny.decode(latents.unsqueeze(0).to(tiny.device, tiny.dtype)))[0, :3]


class _Decoded:
    """A call of a decoder, cut down to one picture.

    Attributes:
        latents: As the call has them.
        frame: ``[channels, h, w]`` of the first row, of a video its middle frame.
    """

    def __init__(self, call: ModuleCall, vae: Any) -> None:
        self._call, self._vae = call, vae
        args, kwargs = call.arguments
        self._keyword = None if args else next(iter(kwargs))
        self.latents: torch.Tensor = args[0] if args else next(iter(kwargs.values()))
        frame = self.latents[0]
        self.frame = frame[:, frame.shape[1] // 2] if frame.ndim == _VIDEO - 1 else frame

    def decode(self) -> torch.Tensor:
        """``[3, height, width]`` in -1..1, by the call's own module and with its other arguments."""
        try:
            pixels = tensor_of(self._one())
        except FAULTS:  # a decoder that takes several frames or none
            pixels = tensor_of(self._call.run())
        pixels = pixels[0, :, pixels.shape[2] // 2] if pixels.ndim == _VIDEO else pixels[0]
        return pixels[:3] * 2 - 1 if _from_zero(self._vae) else pixels[:3]

    def _one(self) -> Any:
        """What the decoder makes of one row and one frame."""
        rows, one = self.latents.shape[0], self.frame.unsqueeze(0)
        args, kwargs = self._call.arguments
        args, kwargs = [_first_row(v, rows) for v in args], {n: _first_row(v, rows) for n, v in kwargs.items()}
        one = one.unsqueeze(2) if self.latents.ndim == _VIDEO else one
        if self._keyword is None:
            args[0] = one
        else:
            kwargs[self._keyword] = one
        if "num_frames" in kwargs:
            kwargs["num_frames"] = 1
        if isinstance(kwargs.get("shape"), tuple):
            kwargs["shape"] = (1, *kwargs["shape"][1:])
        return self._call.target.invoke(*args, **kwargs)


def _first_row(value: Any, rows: int) -> Any:
    return value[:1] if isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == rows else value


def on_host(picture: torch.Tensor) -> Image.Image:
    """A picture as an image: when all of a tick's are under way, since the first copy waits for the device."""
    return Image.fromarray(picture.cpu().numpy())


def scaled_for_model(latents: torch.Tensor, config: Any) -> torch.Tensor:
    """Latents ``[channels, ...]`` of a VAE in the scaling in which its model denoises them."""
    scale = getattr(config, "scaling_factor", None) or 1.0
    mean, deviation = _statistics(latents, config)
    return (latents - mean) / deviation * scale


def scaled_for_vae(latents: torch.Tensor, config: Any) -> torch.Tensor:
    """The inverse of :func:`scaled_for_model`, for ``[rows, channels, ...]``."""
    scale = getattr(config, "scaling_factor", None) or 1.0
    mean, deviation = _statistics(latents[0], config)
    return latents / scale * deviation + mean


def _statistics(latents: torch.Tensor, config: Any) -> tuple[Any, Any]:
    """Mean and deviation of a VAE's latents ``[channels, ...]``, by channel where it has them so."""
    mean, deviation = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is None or deviation is None or len(mean) != len(latents):
        return getattr(config, "shift_factor", None) or 0.0, 1.0
    shape = (-1, *[1] * (latents.ndim - 1))
    tables = (torch.tensor(v, device=latents.device, dtype=latents.dtype).view(shape) for v in (mean, deviation))
    return next(tables), next(tables)


def _decode(module: Any) -> Any:
    return getattr(getattr(module, "_orig_mod", module), "decode", None)


def _is_tiny(vae: Any) -> bool:
    decoder = getattr(vae, "decoder", vae)
    return sum(parameter.numel() for parameter in decoder.parameters()) <= TINY_PARAMETERS


def _shows(vae: Any) -> bool:
    """Whether a VAE decodes to colours: those of sound have one or two channels."""
    channels = getattr(getattr(vae, "config", None), "out_channels", None)
    return channels is None or channels >= 3


def _from_zero(vae: Any) -> bool:
    """Whether a decoder's pixels are in 0..1."""
    return type(vae).__name__ in ("PaellaVQModel", "VQModel") and getattr(vae.config, "lookup_from_codebook", True)
