"""Noise schedulers that a pipeline's own loop cannot follow: not listed, or the request's fault."""

from __future__ import annotations

from typing import Any

import conformance.families  # noqa: F401
import diffusers
import pytest
from conformance.case import CASES
from driving import Driver, config, request

from steploom.weave.noise import choice
from steploom.worker.runner import Runner


@pytest.mark.parametrize(
    ("name", "goes", "not_so"),
    [
        ("LatentConsistencyModelPipeline", "LCMScheduler", "DDIMScheduler"),  # original_inference_steps=
        ("MochiPipeline", "UniPCMultistepScheduler", "DEISMultistepScheduler"),  # sigmas, by position
        ("CogView4Pipeline", "FlowMatchLCMScheduler", "UniPCMultistepScheduler"),  # timesteps and sigmas
        ("CosmosTextToWorldPipeline", "EDMEulerScheduler", "EulerDiscreteScheduler"),  # whose sigma_max is None
        ("SanaSprintPipeline", "SCMScheduler", "DPMSolverMultistepScheduler"),  # which its module only imports
        ("DiffusionGemmaPipeline", "EntropyBoundScheduler", "DDIMScheduler"),  # so it does this one, which goes
        ("HiDreamImagePipeline", "FlowMatchLCMScheduler", "DEISMultistepScheduler"),  # told mu, if not of one class
        ("HiDreamImagePipeline", "UniPCMultistepScheduler", "SASolverScheduler"),  # which is this one
        ("BriaPipeline", "DDIMScheduler", "UniPCMultistepScheduler"),  # told sigmas, if not of two classes
        ("KandinskyV22CombinedPipeline", "EulerDiscreteScheduler", "HeunDiscreteScheduler"),  # its decoder's step
        ("StableCascadeCombinedPipeline", "DDIMScheduler", "DEISMultistepScheduler"),
        ("WuerstchenCombinedPipeline", "DDPMWuerstchenScheduler", "DDIMScheduler"),  # timesteps from 1 to 0
        ("VisualClozePipeline", "FlowMatchLCMScheduler", "UniPCMultistepScheduler"),  # its inner pipelines' loops
    ],
)
def test_what_cannot_be_told_its_steps_is_not_listed(name: str, goes: str, not_so: str) -> None:
    pipe = CASES[name].build()
    listed = choice.choices(pipe.scheduler, pipe)
    assert goes in listed
    assert not_so not in listed


@pytest.mark.slow
def test_a_noise_scheduler_that_fails_at_a_later_step_is_the_requests_fault() -> None:
    case = CASES["StableVideoDiffusionPipeline"]
    inputs: dict[str, Any] = {**case.inputs(0), "num_inference_steps": 4}
    prompt = inputs.pop("prompt", None)
    driver = Driver(Runner.from_pipeline(case.build(), config()))
    error = driver.drain([request("a", prompt, noise_scheduler="UniPCMultistepScheduler", **inputs)])["a"].error
    assert error is not None
    assert (error.kind, error.field) == ("InvalidRequest", "noise_scheduler")
    assert "it failed after 3 steps (AssertionError)" in error.message


class Hidden(diffusers.StableDiffusionPipeline):
    """Says nowhere in its source what it gives to ``step``."""

    def prepare_extra_step_kwargs(self, generator: Any, eta: float) -> dict[str, Any]:
        return {"nonsense": 1}


@pytest.mark.parametrize(
    ("override", "kind"), [("EulerDiscreteScheduler", "InvalidRequest"), (None, "GenerationFailed")]
)
def test_what_step_does_not_take_is_the_requests_fault_if_the_noise_scheduler_is_its_own(
    override: str | None, kind: str
) -> None:
    driver = Driver(Runner.from_pipeline(Hidden(**CASES["StableDiffusionPipeline"].build().components), config()))
    asked: dict[str, Any] = {"height": 16, "width": 16, "num_inference_steps": 2, "noise_scheduler": override}
    error = driver.drain([request("a", "x", **asked)])["a"].error
    assert error is not None
    assert error.kind == kind
    assert "step() got an unexpected keyword argument 'nonsense'" in error.message
    if override:
        assert error.field == "noise_scheduler"
