"""Sizes, shares of the steps and kinds of output that the pipeline cannot make are refused before any work."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from steploom import EngineConfig, InvalidRequest
from steploom.engine.checks.validation import check_arguments
from steploom.protocol import Parameter, PipelineInfo
from steploom.requests import DiffusionRequest
from steploom.weave import signatures
from steploom.worker.traits import lengths

TAKEN = ("prompt", "width", "height", "num_inference_steps", "strength", "sigmas", "denoising_start",
         "use_resolution_binning", "num_frames", "video_length", "image", "class_labels")  # fmt: skip


def check(about: dict[str, Any], **params: Any) -> None:
    info = PipelineInfo(pipeline_class="P", parameters=[Parameter(name) for name in TAKEN], **about)
    check_arguments(DiffusionRequest("a cat", **params), info, EngineConfig())


IMAGE = np.zeros((8, 8, 3), np.uint8)
BINNED = {"size_multiple": 8, "size_multiple_unbinned": 16}
DOWN, UP = {"shortened_by": "strength", "default_steps": 50}, {"shortened_by": "strength", "shortened_up": True}
STRICT = {"frame_multiple": 4, "frames_strict": True}
IDS = {"ids": {"class_labels": 10}}
OUTPUTS = {"output_types": ["latent", "np", "pil", "pt"]}


@pytest.mark.parametrize(
    ("about", "params", "field", "words"),
    [
        (BINNED, {"width": 20}, "width", "width=20: P takes multiples of 8; the nearest is 16 or 24"),
        (BINNED, {"height": 24, "use_resolution_binning": False}, "height", "multiples of 16; the nearest is 16 or 32"),
        ({"size_least": 16}, {"width": 15}, "width", "width=15: P makes at least 16"),
        ({"size_only": (48, 32)}, {"width": 32, "height": 32}, "width", "width=32: this P has positions for 48 alone"),
        ({"size_only": (48, 32)}, {"width": 48, "height": 48}, "height", "positions for 32 alone"),
        (
            {"size_multiple": 4, "size_multiple_pictured": 6},
            {"width": 32, "image": IMAGE},
            "width",
            "width=32: P takes multiples of 12; the nearest is 24 or 36",
        ),
        (
            STRICT,
            {"num_frames": 10},
            "num_frames",
            "num_frames=10: P takes multiples of 4 and one more; the nearest is 9",
        ),
        (STRICT, {"num_frames": 2}, "num_frames", "the nearest is 1 or 5"),
        ({"frames_least": 5}, {"num_frames": 4}, "num_frames", "num_frames=4: P makes at least 5"),
        ({"frames_most": 32}, {"num_frames": 33}, "num_frames", "num_frames=33: this P has positions for at most 32"),
        ({"frames_only": 16}, {"video_length": 15}, "video_length", "this P has positions for 16 frames, or 1"),
        (DOWN, {"strength": 0}, "strength", "strength=0: must be a number greater than 0, and at most 1"),
        (DOWN, {"strength": -0.5}, "strength", "greater than 0"),
        (DOWN, {"strength": 1.5}, "strength", "at most 1"),
        (DOWN, {"strength": "0.5"}, "strength", "must be a number"),
        (DOWN, {"strength": True}, "strength", "must be a number"),
        (DOWN, {"strength": float("nan")}, "strength", "must be a number"),
        (DOWN, {"strength": 0.019}, "strength", "strength=0.019: leaves none of 50 steps; give 0.02 or more"),
        (DOWN, {"strength": 0.3, "num_inference_steps": 3}, "strength", "leaves none of 3 steps; give 0.34 or more"),
        (DOWN, {"strength": 0.3, "sigmas": [1.0, 0.5]}, "strength", "leaves none of 2 steps"),
        (UP, {"strength": 0.0}, "strength", "greater than 0"),
        (OUTPUTS, {"output_type": "jpeg"}, "output_type", "output_type='jpeg': P makes 'latent', 'np', 'pil', 'pt'"),
        (OUTPUTS, {"output_type": "PIL"}, "output_type", "output_type='PIL': P makes 'latent', "),
        ({"output_types": ["text", "seq"]}, {"output_type": "latent"}, "output_type", "P makes 'text', 'seq'"),
        (IDS, {"class_labels": [3, 10]}, "class_labels", "class_labels=[3, 10]: this P has ids from 0 to 9"),
        (IDS, {"class_labels": -1}, "class_labels", "class_labels=-1: this P has ids from 0 to 9"),
        (IDS, {"class_labels": torch.tensor([[10]])}, "class_labels", "this P has ids from 0 to 9"),
        (IDS, {"class_labels": [np.int64(10)]}, "class_labels", "this P has ids from 0 to 9"),
    ],
)
def test_what_does_not_fit_is_refused(about: dict[str, Any], params: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        check(about, **params)
    assert words in str(refused.value)
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("about", "params"),
    [
        (BINNED, {"width": 24, "height": 40}),
        (BINNED, {"width": 32, "height": 48, "use_resolution_binning": False}),
        ({"size_least": 16}, {"width": 16, "height": None}),
        ({"size_only": (48, 32)}, {"width": 48, "height": 32}),
        ({"size_multiple": 4, "size_multiple_pictured": 6}, {"width": 32}),
        (STRICT, {"num_frames": 9}),
        ({"frame_multiple": 4}, {"num_frames": 10}),  # which it rounds
        ({"frames_least": 5, "frames_most": 32}, {"num_frames": 5}),
        ({"frames_least": 5, "frames_most": 32}, {"num_frames": 32}),
        ({"frames_only": 16}, {"video_length": 16}),
        ({"frames_only": 16}, {"video_length": 1}),
        (DOWN, {"strength": 1}),
        (DOWN, {"strength": np.float32(0.5)}),
        (DOWN, {"strength": 0.02}),
        (DOWN, {"strength": 0.001, "denoising_start": 0.5}),  # which says where to begin
        (UP, {"strength": 0.001, "num_inference_steps": 2}),
        ({}, {"strength": 0}),  # of a pipeline to which it means something else
        (OUTPUTS, {"output_type": "np"}),
        ({"output_types": ["text", "seq"]}, {"output_type": "pil"}),  # our default
        ({}, {"output_type": "mesh"}),
        (IDS, {"class_labels": [0, np.int64(9)]}),
        (IDS, {"class_labels": torch.tensor([9])}),
        (IDS, {"class_labels": "whale"}),  # for the pipeline to refuse
    ],
)
def test_what_fits_passes(about: dict[str, Any], params: dict[str, Any]) -> None:
    check(about, **params)


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("FluxPipeline", ["latent", "np", "pil", "pt"]),
        ("WanPipeline", ["latent", "np", "pil", "pt"]),
        ("MarigoldDepthPipeline", ["np", "pt"]),
        ("KandinskyPipeline", ["np", "pil", "pt"]),  # it would refuse latents once they are there
        ("ConsistencyModelPipeline", ["np", "pil", "pt"]),  # in a method of its own
        ("PRXPipeline", ["latent", "np", "pil", "pt"]),  # fewer only without a VAE
        ("LLaDA2Pipeline", ["seq", "text"]),
        ("ShapEPipeline", ["latent", "mesh", "np", "pil"]),
        ("FluxPriorReduxPipeline", []),
    ],
)
def test_the_kinds_of_output_are_those_of_the_pipelines_own_source(name: str, taken: list[str]) -> None:
    pipeline = object.__new__(getattr(diffusers, name))
    assert signatures.output_types(pipeline) == taken
    own = {"MarigoldDepthPipeline": "np", "LLaDA2Pipeline": "text"}.get(name, "pil")
    assert signatures.output_type(pipeline, "pil") == own
    assert signatures.output_type(pipeline, "pt") == "pt"


def test_the_kinds_of_output_of_a_cascade_are_those_of_its_last_stage() -> None:
    cascade = object.__new__(diffusers.KandinskyCombinedPipeline)
    assert "latent" in signatures.output_types(cascade)
    cascade.decoder_pipe = object.__new__(diffusers.KandinskyPipeline)
    cascade.prior_pipe = object.__new__(diffusers.KandinskyPriorPipeline)  # which it is not handed to
    assert signatures.output_types(cascade) == ["np", "pil", "pt"]


def test_a_pipeline_of_somebody_elses_may_take_any_kind_of_output() -> None:
    class Own(diffusers.FluxPipeline):
        def __call__(self, prompt: str, output_type: str = "jpeg") -> Any:
            return self.written(prompt, output_type)

    class Writer(diffusers.FluxPipeline):
        def __call__(self, prompt: str, output_type: str = "text") -> Any:
            return self.written(prompt, output_type)

    assert signatures.output_types(object.__new__(Own)) == []
    assert signatures.output_type(object.__new__(Own), "pil") == "pil"
    assert signatures.output_type(object.__new__(Writer), "pil") == "text"


@pytest.mark.parametrize(
    ("name", "by", "up"),
    [
        ("StableDiffusionImg2ImgPipeline", "strength", False),
        ("AnimateDiffVideoToVideoPipeline", "strength", False),
        ("StableDiffusionInpaintPipeline", "strength", False),
        ("FluxImg2ImgPipeline", "strength", True),
        ("LTXConditionPipeline", "denoise_strength", False),  # whose strength is that of the conditions
        ("FluxPipeline", "", False),
        ("LTXImageToVideoPipeline", "", False),
    ],
)
def test_which_argument_shortens_a_request_is_read_from_its_pipeline(name: str, by: str, up: bool) -> None:
    assert lengths.shortened(object.__new__(getattr(diffusers, name))) == (by, up)
