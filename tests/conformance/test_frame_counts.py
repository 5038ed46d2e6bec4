"""The numbers of frames that a pipeline is said to make it makes, and at those that it is not it fails."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import conformance.families  # noqa: F401 - registers the cases
import pytest
import torch
from conformance.case import CASES, Case

from steploom import AsyncDiffusionEngine, DiffusionRequest, EngineConfig, InvalidRequest
from steploom.engine.checks.validation import check_arguments
from steploom.protocol.pictures import FRAMES
from steploom.worker.models import loading
from steploom.worker.trials import trial

_SLOW = pytest.mark.slow


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        pytest.param("AllegroPipeline", "frames_least", 5, marks=_SLOW),
        pytest.param("Kandinsky5I2VPipeline", "frames_least", 4, marks=_SLOW),
        pytest.param("StableVideoDiffusionPipeline", "frames_least", 2, marks=_SLOW),
        ("CosmosVideoToWorldPipeline", "frames_strict", True),
        ("CosmosTextToWorldPipeline", "frames_most", 16),
        ("AnimateDiffPipeline", "frames_most", 32),
        ("LattePipeline", "frames_only", 2),
    ],
)
def test_what_a_pipeline_fails_at_is_refused_and_what_it_does_not_is_taken(name: str, field: str, value: Any) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    pipeline = case.build()
    pipeline.set_progress_bar_config(disable=True)
    info = loading.describe(pipeline, in_process=True)
    assert getattr(info, field) == value
    taken, failing = {
        "frames_least": ([value], value - 1),
        "frames_strict": ([5, 9], 8),
        "frames_most": ([value], value + 1),
        "frames_only": ([1, value], value + 1),
    }[field]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for count in taken:
            request = _request(case, count)
            check_arguments(request, info, EngineConfig())
            trial.run_alone(pipeline, request)
        request = _request(case, failing)
        with pytest.raises(InvalidRequest, match=rf"={failing}: .*{name}"):
            check_arguments(request, info, EngineConfig())
        with pytest.raises((RuntimeError, ValueError, AttributeError)):
            trial.run_alone(pipeline, request)


def test_free_noise_has_positions_for_a_window_of_any_length() -> None:
    pipeline = CASES["AnimateDiffPipeline"].build()
    pipeline.enable_free_noise()
    assert loading.describe(pipeline, in_process=True).frames_most is None


@pytest.mark.slow
async def test_free_noise_has_a_prompt_for_a_frame() -> None:
    case = CASES["AnimateDiffPipeline"]
    asked = {"num_inference_steps": 2, "num_frames": 8, "output_type": "latent"}
    torch.manual_seed(0)
    pipeline = case.build()
    pipeline.enable_free_noise(context_length=4, context_stride=2)
    prompts: list[Any] = [{0: "a cat", 4: "a dog"}, {0: "a cat", 4: "a cow"}]
    alone = [pipeline(one, generator=torch.Generator().manual_seed(1), **asked).frames for one in prompts]
    async with AsyncDiffusionEngine.from_pipeline(pipeline) as engine:
        for prompt, expected in zip(prompts, alone, strict=True):
            output = await engine.generate(prompt, seed=1, **asked)
            assert torch.allclose(output.output.frames, expected, atol=1e-4)
    assert not torch.allclose(*alone, atol=1e-3)


@pytest.mark.parametrize(("width", "fits"), [(36, True), (38, False)])
def test_what_a_picture_is_rounded_to_is_told(width: int, fits: bool) -> None:
    case = CASES["DreamLitePipeline-edit"]
    torch.manual_seed(0)
    pipeline = case.build()
    pipeline.set_progress_bar_config(disable=True)
    info = loading.describe(pipeline, in_process=True)
    request = case.request(0, width=width, height=32)
    if fits:
        check_arguments(request, info, EngineConfig())
        trial.run_alone(pipeline, request)
        return
    with pytest.raises(
        InvalidRequest, match="width=38: DreamLitePipeline takes multiples of 4; the nearest is 36 or 40"
    ):
        check_arguments(request, info, EngineConfig())
    with pytest.raises(RuntimeError):
        trial.run_alone(pipeline, request)


def _request(case: Case, count: int) -> DiffusionRequest:
    inputs = case.inputs(0)
    name = next(name for name in FRAMES if name in inputs)
    inputs = {**inputs, name: count, "output_type": "np"}
    return dataclasses.replace(case, inputs=lambda _: inputs, steps=(1, 1, 1)).request(0)
