"""Requests for all tasks of a tiny pipeline's family, and what diffusers' own sibling pipelines give for them alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import tiny
from conformance import parts_sd
from driving import alone

from steploom.requests import DiffusionRequest

AUTO = {
    "text-to-image": "AutoPipelineForText2Image",
    "image-to-image": "AutoPipelineForImage2Image",
    "inpainting": "AutoPipelineForInpainting",
}
PROMPTS = ("a red circle", "a blue square", "a green hill")
STEPS = 4


def stable_diffusion(**changes: Any) -> Any:
    """Stable Diffusion 1.5, tiny; ``changes`` are settings of its UNet."""
    return diffusers.StableDiffusionPipeline(**parts_sd.parts(parts_sd.ddim(), **changes))


def stable_diffusion_3() -> Any:
    """Stable Diffusion 3, tiny but for the 16 channels that its inpainting asks for."""
    components = tiny.sd3().components
    settings = {**components["transformer"].config, "in_channels": 16, "out_channels": 16}
    components["transformer"] = tiny.scaled(diffusers.SD3Transformer2DModel.from_config(settings))
    components["vae"] = tiny.vae(16, shift_factor=0.1, scaling_factor=1.5)
    return diffusers.StableDiffusion3Pipeline(**components)


def requests(name: str = "", size: int = parts_sd.SIZE, tasks: Any = tuple(AUTO), **params: Any) -> list[Any]:
    """Two requests for each task, all with the same number of steps in their loops, and with nothing else alike."""
    made: list[DiffusionRequest] = []
    for i in range(2):
        seed, guidance = len(made) + 10 * len(name), 4.0 + i
        plain: dict[str, Any] = {"num_inference_steps": STEPS, "height": size, "width": size}
        source = {"image": parts_sd.picture(i + 5 * len(name), size), "strength": 0.5, "num_inference_steps": 2 * STEPS}
        if "max_sequence_length" in params:  # the newer families take sizes beside an image
            source |= {"height": size, "width": size}
        masked = {**source, "mask_image": parts_sd.mask(i, size), "height": size, "width": size}
        for task, extra in (("text-to-image", plain), ("image-to-image", source), ("inpainting", masked)):
            if task in tasks:
                made.append(
                    DiffusionRequest(
                        PROMPTS[i], request_id=f"{name}{task} {i}", seed=seed + len(made), task=task,
                        output_type="latent", guidance_scale=guidance, **extra, **params,
                    )
                )  # fmt: skip
    return made


def oracle(build: Callable[[], Any], wanted: list[DiffusionRequest]) -> dict[str, Any]:
    """What ``AutoPipelineFor....from_pipe(pipe)(...)`` gives for each request, alone, by request id."""
    pipe = build()
    siblings: dict[Any, Any] = {
        task: getattr(diffusers, AUTO[task]).from_pipe(pipe) for task in {request.task for request in wanted}
    }
    return {request.request_id: alone(siblings[request.task], request) for request in wanted}
