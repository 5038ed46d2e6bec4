"""The trial's judgement: what rounding explains is allowed, and nothing else."""

from __future__ import annotations

import dataclasses
from typing import Any

import conformance.families  # noqa: F401 - registers the cases
import pytest
import torch
from conformance.case import CASES, Case

from steploom.requests import DiffusionRequest
from steploom.worker.trials import trial
from steploom.worker.trials.rounding import rounded_otherwise

VERDICT = trial.Verdict(distances=(5e-4,), share=1.0, reasons={}, alone_s=1.0, together_s=1.0)


def judged(case: Case, build: Any = None) -> trial.Verdict:
    torch.manual_seed(0)
    pipeline = (build or case.build)()
    pipeline.set_progress_bar_config(disable=True)
    requests: list[DiffusionRequest] = [case.request(number) for number in range(2)]
    expected = [trial.run_alone(pipeline, request) for request in requests]
    state = torch.get_rng_state()
    verdict = trial._judged(VERDICT, pipeline, requests, expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert trial.distance(trial.run_alone(pipeline, requests[0]), expected[0]) == 0, "the hooks are gone"
    return verdict


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "FluxPipeline"])
def test_what_is_off_by_more_than_rounding_is_not_equal(name: str) -> None:
    verdict = judged(CASES[name])
    assert verdict.tolerance == trial.TOLERANCE
    assert not verdict.equal


def test_a_pipeline_that_amplifies_rounding_may_differ_by_as_much() -> None:
    case = CASES["StableDiffusionPipeline"]

    def amplifying() -> Any:
        pipeline = case.build()

        def hook(_module: torch.nn.Module, _args: Any, output: Any) -> Any:
            sample = output[0] if isinstance(output, tuple) else output.sample
            return (sample + torch.round(sample * 1e3) / 100,)  # the last bit decides on which side

        pipeline.unet.register_forward_hook(hook)
        return pipeline

    verdict = judged(case, amplifying)
    assert verdict.tolerance > trial.TOLERANCE
    assert dataclasses.replace(verdict, distances=(verdict.tolerance * 2,)).equal is False


def test_only_the_last_bits_differ() -> None:
    torch.manual_seed(0)
    pipeline = CASES["StableDiffusionPipeline"].build()
    arguments = torch.randn(1, 4, 8, 8), 1, torch.randn(1, 4, pipeline.unet.config.cross_attention_dim)
    plain = pipeline.unet(*arguments)
    with rounded_otherwise(pipeline):
        other = pipeline.unet(*arguments)
    assert type(other) is type(plain)
    assert 0 < trial.distance(other, plain) < 1e-5
