"""What one request may come to, as its pipeline settles it: the second line behind the checks of its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from steploom.config import EngineConfig
from steploom.errors import InvalidRequest
from steploom.media.pictures import brief
from steploom.protocol import PipelineInfo
from steploom.protocol.pictures import FRAMES, LATENT_WINDOWS, WINDOWS, pictures_among
from steploom.protocol.pipeline import SOUND
from steploom.protocol.windows import windows
from steploom.requests import DiffusionRequest
from steploom.weave.noise import observed

_TURNS = ("jump_n_sample", "ar_step")
"""Arguments that make a loop longer than ``num_inference_steps`` says."""

_STEPS = "num_inference_steps"

_EACH = ("image_embeds", "image_embeddings", "class_labels", "latents", "image")
"""Arguments that may have an entry for each image."""


class RequestBounds:
    """Refuses what a pipeline is about to make of a request, if that is more than ``config`` allows.

    Some choose a size for a picture, or bring what they are given to an area of their own; some make a video in
    windows, or go back and forth in their steps. All raise InvalidRequest.

    Args:
        request: The request.
        info: The pipeline that does it.
        config: Has the limits.
    """

    def __init__(self, request: DiffusionRequest, info: PipelineInfo, config: EngineConfig) -> None:
        self._request = request
        self._info = info
        self._config = config
        self._begun = 0
        self._has_stages = sum(parameter.name.endswith(_STEPS) for parameter in info.parameters) > 1

    def laid_out(self, width: int | None, height: int | None, frames: int | None) -> None:
        """The size of the images, and the frames that are made at once."""
        if width is not None and height is not None:
            self._sized(width, height)
        # Pipelines round frames up to whole patches of latents, which nobody asked for.
        if frames is not None and frames > self._config.max_frames + 2 * self._info.frame_multiple:
            field, said = self._blamed((*LATENT_WINDOWS, *WINDOWS, *FRAMES), "num_frames")
            raise InvalidRequest(
                f"{said}: {self._info.pipeline_class} makes {frames} frames at once, at most {self._config.max_frames} "
                "of one request (EngineConfig.max_frames)",
                field=field,
            )

    def prepared(self, pipeline_class: str, shape: Sequence[int]) -> None:
        """The latents that a stage of it begins with: as many rows as images, and as large as they will be."""
        video = self._info.default_frames or {parameter.name for parameter in self._info.parameters} & {*FRAMES}
        if len(shape) > 1 and shape[0] > self._config.max_images and not (video and len(shape) == 4):  # rows of frames
            field, said = self._blamed([name for name in _EACH if self._request.params.get(name) is not None], "prompt")
            raise InvalidRequest(
                f"{said}: {self._info.pipeline_class} makes {shape[0]} of it, at most {self._config.max_images} images "
                "of one request (EngineConfig.max_images)",
                field=field,
            )
        whole = pipeline_class == self._info.pipeline_class and self._info.makes == ["images"]
        if whole and len(shape) == 4 and not video:
            height, width = (side * self._info.pixels_per_latent for side in shape[2:])
            self._sized(width, height)
        if self._info.makes == ["audios"] and len(shape) > self._info.latent_sound_axis:
            self._sounding(shape[self._info.latent_sound_axis] * self._info.latent_sound_s)

    def counted(self, steps: int, before: int, noise_schedulers: Sequence[Any]) -> None:
        """The steps of its loop, with those of the loops before; of windows the least of all that follow, too.

        A pipeline of several stages has an argument for the steps of each, and each is bounded by itself.
        """
        self._begun += 1
        steps += 0 if self._has_stages else before
        made = windows(self._request.params, self._info)
        if made is not None:
            steps += max(0, made.times - self._begun) * made.steps
        if steps <= observed.turns(self._config.max_steps, noise_schedulers):
            return
        field, said = self._blamed(_TURNS, _STEPS)
        raise InvalidRequest(
            f"{said}: {self._info.pipeline_class} takes {steps} steps of it, at most {self._config.max_steps} "
            "(EngineConfig.max_steps)",
            field=field,
        )

    def _blamed(self, names: Sequence[str], otherwise: str) -> tuple[str, str]:
        """The likeliest argument, and what a message says of it: the first of ``names`` that the pipeline has."""
        known = {parameter.name for parameter in self._info.parameters}
        field = next((name for name in names if name in known), otherwise)
        value = self._request.prompt if field == "prompt" else self._request.params.get(field)
        return field, f"{field}, as it is by default" if value is None else f"{field}={brief(value)}"

    def _sounding(self, seconds: float) -> None:
        """Some make as much as they always do, and cut off what was not asked for."""
        most = max(self._config.max_sound_s, self._info.default_sound_s or 0.0)
        if seconds <= most + 2 * self._info.latent_sound_s:  # they round up to whole latents
            return
        field, said = self._blamed([*(name for name in _EACH if name in self._request.params), *SOUND], "prompt")
        raise InvalidRequest(
            f"{said}: {self._info.pipeline_class} makes {seconds:g} seconds of it, at most "
            f"{self._config.max_sound_s:g} seconds of sound of one request (EngineConfig.max_sound_s)",
            field=field,
        )

    def _sized(self, width: int, height: int) -> None:
        if width * height <= self._config.max_pixels:
            return
        params = self._request.params
        given = {name: params[name] for name in ("width", "height") if params.get(name)}
        brought = {name: params[name] for name in _EACH if params.get(name) is not None}
        said = given or pictures_among(params, self._info) or brought or {"width": None, "height": None}
        raise InvalidRequest(
            f"{', '.join(f'{name}={brief(value)}' for name, value in said.items())}: {self._info.pipeline_class} makes "
            f"{width}x{height} of it, at most {self._config.max_pixels} pixels (EngineConfig.max_pixels)",
            field=next(iter(said)),
        )
