"""Pretended models of images, and of videos."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from steploom._pretended.drawing import DEFAULT_SIZE, SIZE_MULTIPLE, films, floats, images, latents, picture
from steploom.protocol import Parameter, PipelineInfo, RequestReport
from steploom.requests import DiffusionRequest

TEXT_TO_IMAGE = ("prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "width", "height",
                 "num_images_per_prompt")  # fmt: skip
IMAGE_TO_IMAGE = (*TEXT_TO_IMAGE, "image", "strength")
INPAINTING = (*IMAGE_TO_IMAGE, "mask_image")
TEXT_TO_VIDEO = (*TEXT_TO_IMAGE[:-1], "num_frames", "num_videos_per_prompt", "image")
DEFAULT_STEPS = 8
DEFAULT_FRAMES = 17
FRAME_MULTIPLE = 4


class ImageModel:
    """Text-to-image, image-to-image and inpainting: squares of colour."""

    def info(self) -> PipelineInfo:
        """The pipeline, and those of its tasks."""
        tasks = {"text-to-image": TEXT_TO_IMAGE, "image-to-image": IMAGE_TO_IMAGE, "inpainting": INPAINTING}
        main = _info(TEXT_TO_IMAGE)
        main.tasks = {task: [_info(names)] for task, names in tasks.items()}
        return main

    def said_to(self, request: DiffusionRequest) -> str:
        """The prompt."""
        return str(request.prompt)

    def total_steps(self, request: DiffusionRequest) -> int:
        """As asked for."""
        return request.params.get("num_inference_steps") or DEFAULT_STEPS

    def tell(self, report: RequestReport, request: DiffusionRequest) -> None:
        """A preview and latents, in the steps that want them."""
        done, total = report.step, self.total_steps(request)
        if request.preview_every and done % request.preview_every == 0:
            report.preview = picture(request, 0, done / total)
        if request.latents_every and done % request.latents_every == 0:
            report.latents = latents(request, [done], total)

    def finish(self, report: RequestReport, request: DiffusionRequest) -> None:
        """The output, and the way to it."""
        report.output = self._output(request)
        if request.return_trajectory:
            total = self.total_steps(request)
            steps = range(1, total + 1)
            report.trajectory_latents = latents(request, steps, total, trajectory=True)
            report.trajectory_timesteps = floats([1000 * (1 - (step - 1) / total) for step in steps], [total])

    def _output(self, request: DiffusionRequest) -> Any:
        return SimpleNamespace(images=images(request, self.total_steps(request)))


class VideoModel(ImageModel):
    """Videos from a prompt and, if given, a picture."""

    def info(self) -> PipelineInfo:
        """The pipeline."""
        info = _info(TEXT_TO_VIDEO, required=("prompt",))
        info.makes, info.default_frames, info.frame_multiple = ["videos"], DEFAULT_FRAMES, FRAME_MULTIPLE
        return info

    def _output(self, request: DiffusionRequest) -> Any:
        return SimpleNamespace(frames=films(request, DEFAULT_FRAMES))


def _info(names: Sequence[str], required: Sequence[str] = ("prompt", "image", "mask_image")) -> PipelineInfo:
    return PipelineInfo(
        pipeline_class="FakePipeline",
        parameters=[Parameter(name, name in required) for name in names],
        default_steps=DEFAULT_STEPS,
        default_size=DEFAULT_SIZE,
        size_multiple=SIZE_MULTIPLE,
        makes=["images"],
    )
