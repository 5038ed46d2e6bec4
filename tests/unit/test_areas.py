"""How large the images of a request will be, as far as its arguments say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from PIL import Image

from steploom import EngineConfig, InvalidRequest
from steploom.engine.checks.validation import validate
from steploom.protocol import Parameter, PipelineInfo
from steploom.requests import DiffusionRequest

NUMBERS = ("width", "height", "upsampling_width", "upsampling_height", "max_area", "resolution", "output_resolution",
           "processing_resolution", "resolution_scale", "frames", "layers", "num_frames")  # fmt: skip
PICTURES = ("image", "mask_image", "ip_adapter_image", "video")
PARAMETERS = [
    *(Parameter(name, kind="number") for name in NUMBERS),
    *(Parameter(name, kind="picture") for name in PICTURES),
    *map(Parameter, ("prompt", "latents", "pyramid_num_inference_steps_list", "timesteps", "sigmas", "conditions")),
]
LIMITS = EngineConfig(max_pixels=64 * 64, max_steps=10, max_images=4, max_frames=9)
SIZED = {"default_size": (128, 128)}
SMALL = Image.new("RGB", (32, 32))


def check(info: dict[str, Any], **params: Any) -> None:
    pipeline = PipelineInfo(pipeline_class="P", parameters=PARAMETERS, in_process=True, **info)
    validate(DiffusionRequest("a", **params), pipeline, LIMITS)


@dataclass
class Condition:
    """What diffusers' LTX pipelines take."""

    image: Any = None
    video: Any = None
    frame_index: int = 0


LARGE = Image.new("RGB", (65, 64))


@pytest.mark.parametrize(
    ("info", "params", "field", "words"),
    [
        ({}, {"width": 65, "height": 64}, "width", "width=65, height=64: at most 4096 pixels .*max_pixels"),
        (SIZED, {}, "width", "width=128, height=128: at most"),
        (SIZED, {"width": 64}, "width", "width=64, height=128: at most"),
        (SIZED, {"image": SMALL}, "width", "width=128, height=128"),
        (SIZED | {"follows_pictures": True}, {"image": SMALL, "width": 64}, "width", "width=64, height=128"),
        ({"enlarges": 2.0}, {"width": 64, "height": 64}, "width", "height=64, of which P makes 128x128: at most"),
        ({}, {"upsampling_width": 65, "upsampling_height": 64}, "upsampling_width", "upsampling_height=64: at"),
        ({}, {"max_area": 4097}, "max_area", "max_area=4097: at most"),
        ({}, {"resolution": 65}, "resolution", "resolution=65: at most"),
        ({}, {"output_resolution": 65}, "output_resolution", "at most"),
        ({}, {"processing_resolution": 65}, "processing_resolution", "at most"),
        ({"pixels_per_latent": 8}, {"latents": np.zeros((1, 4, 8, 9))}, "latents", "which make 72x64: at most"),
        ({"pixels_per_latent": 8}, {"latents": np.zeros((1, 4, 3, 9, 8))}, "latents", "which make 64x72: at most"),
        (
            {"pixels_per_latent": 8, "latent_axes": (1, 2, 3)},
            {"latents": np.zeros((1, 1, 9, 8, 4))},
            "latents",
            "which make 64x72: at most",
        ),
        (
            {"follows_pictures": True, "enlarges": 4.0},
            {"image": [SMALL.resize((16, 16)), SMALL]},
            "image",
            "P makes 128x128 of 32x32: at most",
        ),
        ({"follows_pictures": True, "enlarges": 2.25}, {"video": [SMALL]}, "video", "P makes 72x72 of 32x32"),
        ({"follows_pictures": True}, {"video": [SMALL], "resolution_scale": 2.25}, "video", "P makes 72x72"),
        ({}, {"image": [SMALL] * 5}, "image", "image: 5 pictures, at most 4 of one request .*max_images"),
        ({}, {"image": np.zeros((5, 8, 8, 3), np.float32)}, "image", "image: 5 pictures"),
        ({}, {"video": np.zeros((2, 5, 8, 8, 3), np.float32)}, "video", "video: 10 pictures, at most 9 .*max_frames"),
        ({}, {"conditions": Condition(LARGE)}, "conditions", "conditions: 65x64 is more than 4096 pixels .*max_pixels"),
        ({}, {"conditions": [Condition(SMALL), Condition(video=[LARGE])]}, "conditions", "65x64 is more than 4096"),
        ({}, {"conditions": Condition(video=[SMALL] * 10)}, "conditions", "10 pictures, at most 9 .*max_frames"),
        ({}, {"conditions": [Condition(SMALL)] * 10}, "conditions", "10 pictures, at most 9 .*max_frames"),
        ({}, {"frames": 10}, "frames", "frames=10: at most 9 frames"),
        ({"default_frames": 10}, {}, "num_frames", "num_frames=10: at most 9 frames"),
        ({"default_steps": 50}, {}, "num_inference_steps", "num_inference_steps=50: at most 10"),
        ({"default_steps": 50}, {"timesteps": [*range(11)]}, "timesteps", "timesteps: 11 steps: at most 10"),
        ({}, {"layers": 5}, "layers", "layers=5: at most 4 images"),
        ({}, {"pyramid_num_inference_steps_list": [4, 4, 4]}, "pyramid_num_inference_steps_list", ": 12 steps: at"),
    ],
)
def test_more_pixels_than_allowed_are_refused(info: Any, params: Any, field: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        check(info, **params)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("info", "params"),
    [
        ({}, {"width": 64, "height": 64}),
        (SIZED, {"width": 64, "height": 64}),
        (SIZED | {"follows_pictures": True}, {"image": SMALL}),
        ({}, {"width": 4096}),  # nobody knows the height
        ({"enlarges": 2.0}, {"width": 32, "height": 32}),
        ({}, {"upsampling_width": 64, "upsampling_height": 64, "max_area": 4096, "resolution": 64}),
        ({"pixels_per_latent": 8}, {"latents": np.zeros((1, 4, 8, 8))}),
        ({"pixels_per_latent": 8}, {"latents": np.zeros((1, 9999, 64))}),  # packed
        ({}, {"latents": np.zeros((1, 4, 99, 99))}),
        ({"follows_pictures": True, "enlarges": 4.0}, {"mask_image": SMALL, "ip_adapter_image": SMALL}),
        ({"enlarges": 4.0}, {"video": [SMALL]}),  # which is brought to width and height
        ({}, {"image": [SMALL] * 4, "video": [SMALL] * 9, "frames": 9}),
        ({}, {"conditions": [Condition(SMALL), Condition(video=[SMALL] * 8)]}),
        ({}, {"frames": 2, "layers": 4}),
        ({"default_steps": 50}, {"timesteps": [999, 500, 1]}),
        ({"default_steps": 50}, {"sigmas": np.linspace(1, 0.1, 10)}),
        ({}, {"pyramid_num_inference_steps_list": [3, 3, 4]}),
    ],
)
def test_as_many_as_allowed_pass(info: Any, params: Any) -> None:
    check(info, **params)


def test_what_is_called_like_a_number_and_is_none_passes() -> None:
    """A pipeline of somebody's own may call its pictures frames, and something else layers."""
    names = [Parameter("frames", kind="picture"), Parameter("layers")]
    pipeline = PipelineInfo(pipeline_class="P", parameters=names, in_process=True)
    validate(DiffusionRequest(frames=[SMALL] * 9, layers=["down", "up"]), pipeline, EngineConfig(max_frames=9))
    with pytest.raises(InvalidRequest, match="frames: 10 pictures"):
        validate(DiffusionRequest(frames=[SMALL] * 10), pipeline, EngineConfig(max_frames=9))
