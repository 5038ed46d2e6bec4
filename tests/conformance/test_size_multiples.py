"""The sizes that a pipeline is said to take it takes, and one in between it does not: nobody refuses what would run."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import conformance.families  # noqa: F401 - registers the cases
import pytest
import torch
from conformance.case import CASES, Case
from PIL import Image

from steploom import DiffusionRequest, EngineConfig, InvalidRequest
from steploom.engine.checks.validation import check_arguments
from steploom.protocol import PipelineInfo
from steploom.worker.models import loading
from steploom.worker.trials import trial

_FIXED = ("GlmImagePipeline",)
"""Classes whose cases give a layout of one size."""
_QUICK = (
    "AllegroPipeline", "AuraFlowPipeline", "CogVideoXImageToVideoPipeline", "CogVideoXPipeline", "ErnieImagePipeline",
    "FluxPipeline", "HunyuanDiTPipeline", "IFPipeline", "KandinskyV22CombinedPipeline", "MochiPipeline",
    "PixArtAlphaPipeline", "SanaPipeline", "StableDiffusion3Pipeline", "StableDiffusionImageVariationPipeline",
    "StableDiffusionPipeline", "StableVideoDiffusionPipeline", "WanImageToVideoPipeline", "WanPipeline",
    "WuerstchenCombinedPipeline", "ZImagePipeline",
)  # fmt: skip
"""One of each way in which pipelines come to the sizes that they take."""


def _sized() -> list[Any]:
    return [
        pytest.param(name, marks=() if name in _QUICK else pytest.mark.slow)
        for name, case in sorted(CASES.items())
        if case.pipeline not in _FIXED and ("height" in case.inputs(0) or name in _QUICK)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", _sized())
def test_a_pipeline_takes_the_multiples_that_it_is_said_to_take_and_no_others(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    pipeline = case.build()
    pipeline.set_progress_bar_config(disable=True)
    info = loading.describe(pipeline, in_process=True)
    binned = case.inputs(0).get("use_resolution_binning", True)
    of = info.size_multiple if binned else info.size_multiple_unbinned
    width, height = _one_odd_multiple(case, info, of)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _run(pipeline, case, width, height)
        between = max(of // 2, 1) if info.size_only is None else of
        if between < of or info.size_only is not None:
            with pytest.raises((ValueError, RuntimeError)):
                _run(pipeline, case, width + between, height + between)


@pytest.mark.parametrize(
    ("name", "bound"),
    [("CogVideoXImageToVideoPipeline", (16, 16)), ("ConsisIDPipeline", (16, 16)), ("AuraFlowPipeline", 32)],
)
def test_the_sizes_of_learned_positions_are_told(name: str, bound: Any) -> None:
    case = CASES[name]
    info = loading.describe(case.build(), in_process=True)
    assert bound in (info.size_only, info.size_most)
    request = DiffusionRequest(**{**case.inputs(0), "width": 48, "height": 16})
    with pytest.raises(InvalidRequest, match=r"width=48: this .* has positions for"):
        check_arguments(request, info, EngineConfig())


def _one_odd_multiple(case: Case, info: PipelineInfo, of: int) -> tuple[int, int]:
    """A size other than the case's own, a multiple of the told one but not of twice that."""
    if info.size_only is not None:
        return info.size_only
    side = max(case.inputs(0).get("height", 0) + 1, info.size_least, 16)
    odd = -(-side // of) | 1
    assert info.size_most is None or odd * of <= info.size_most
    return odd * of, odd * of


def _run(pipeline: Any, case: Case, width: int, height: int) -> None:
    """Few steps of the case's first request, at another size; pictures have it, too."""
    inputs = {name: _resized(value, width, height) for name, value in case.inputs(0).items()}
    steps = (4 if "strength" in inputs else 2,) * 3
    small = dataclasses.replace(case, inputs=lambda i: {**inputs, "width": width, "height": height}, steps=steps)
    trial.run_alone(pipeline, small.request(0))


def _resized(value: Any, width: int, height: int) -> Any:
    if isinstance(value, list):
        return [_resized(one, width, height) for one in value]
    return value.resize((width, height)) if isinstance(value, Image.Image) else value
