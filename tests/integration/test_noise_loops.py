"""Noise schedulers that a pipeline's own loop cannot follow: not listed, or the request's fault."""

from __future__ import annotations

from typing import Any

import conformance.families  # noqa: F401
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
