"""VisualCloze: a task shown by examples in a grid of pictures, its missing cell filled by Flux."""

from __future__ import annotations

from typing import Any

import tiny
from conformance.case import PROMPTS, case
from conformance.pictures import picture
from diffusers import FluxTransformer2DModel, VisualClozePipeline

_TASKS = ("colour it", "blur it", "draw it in ink")


def _inputs(i: int) -> dict[str, Any]:
    grid = [[picture(4 * i), picture(4 * i + 1)], [picture(4 * i + 2), None]]
    return {
        "task_prompt": _TASKS[i], "content_prompt": PROMPTS[i], "image": grid, "guidance_scale": 20.0 + 5 * i,
        "upsampling_strength": 0, "max_sequence_length": 192,
    }  # fmt: skip


def _upsampled(i: int) -> dict[str, Any]:
    return _inputs(i) | {"upsampling_strength": 0.6, "upsampling_height": 32, "upsampling_width": 32}


def _pipeline() -> Any:
    flux = tiny.flux()
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=48, out_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )  # fmt: skip
    pipeline = VisualClozePipeline(
        scheduler=flux.scheduler, vae=flux.vae, text_encoder=flux.text_encoder, tokenizer=flux.tokenizer,
        text_encoder_2=flux.text_encoder_2, tokenizer_2=tiny.tokenizer(192), transformer=tiny.scaled(transformer, 1.5),
        resolution=32,
    )  # fmt: skip
    for stage in (pipeline.generation_pipe, pipeline.upsampling_pipe):
        stage.set_progress_bar_config(disable=True)
    return pipeline


@case("VisualClozePipeline", "VisualCloze", "editing", _inputs)
def generated() -> Any:
    return _pipeline()


@case("VisualClozePipeline", "VisualCloze", "editing", _upsampled, variant="upsampled", steps=(5, 5, 5))
def upsampled() -> Any:
    """Two stages of different sizes: requests share calls while they are in the same one."""
    return _pipeline()
