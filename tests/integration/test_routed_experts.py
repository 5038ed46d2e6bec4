"""Mixtures of experts share their forwards, although other company makes their experts round otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import tiny_language
import torch
from conformance.case import CASES
from conformance.families import hidream
from diffusers import DiscreteDDIMScheduler, SD3Transformer2DModel
from driving import Driver, config, tensor_of

from steploom.requests import DiffusionRequest
from steploom.telemetry.reasons import fold
from steploom.weave.batching.fixed import BY_VALUES
from steploom.worker.runner import Runner
from steploom.worker.trials import trial

EXPERTS = 16


def assert_shared(pipeline: Any, requests: list[DiffusionRequest]) -> None:
    verdict = trial.trial(pipeline, requests, trial.tolerance_of(pipeline))
    assert verdict.equal, (verdict.distances, verdict.error)
    if trial.tolerance_of(pipeline) == trial.TOLERANCE:  # in bfloat16 rounding tips tokens, alone, too
        assert verdict.tolerance == trial.TOLERANCE
    assert verdict.batched, (verdict.share, verdict.why_not)


def gemma(dtype: torch.dtype, seed: int, **text: int) -> Any:
    torch.manual_seed(seed)
    pipeline = tiny_language.gemma(DiscreteDDIMScheduler(), **text)
    pipeline.to(dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def texts(seed: int) -> list[DiffusionRequest]:
    lengths = [1 + (3 * seed + i) % 7 for i in range(2)]
    params = [{"gen_length": 16, "num_inference_steps": 4 + i} for i in range(2)]
    return [
        DiffusionRequest(prompt="x" * lengths[i] + str(i), seed=10 * seed + i, output_type="text", **params[i])
        for i in range(2)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", [pytest.param(seed, marks=pytest.mark.slow) for seed in range(4)])
def test_gemma_of_many_experts(seed: int, dtype: torch.dtype) -> None:
    assert_shared(gemma(dtype, seed, num_experts=EXPERTS), texts(seed))


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 3))])
def test_float32_logits_of_a_model_in_bfloat16(seed: int) -> None:
    """All experts are chosen, so no row count changes; the logits are float32, rounded as bfloat16 is."""
    assert_shared(gemma(torch.bfloat16, seed, top_k_experts=4), texts(seed))


@pytest.fixture
def many_experts(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    transformer = hidream.HiDreamImageTransformer2DModel
    made = lambda **sizes: transformer(**{**sizes, "num_routed_experts": EXPERTS})  # noqa: E731
    monkeypatch.setattr(hidream, "HiDreamImageTransformer2DModel", made)
    return CASES["HiDreamImagePipeline"].build


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 3))])
def test_hidream_of_many_experts(seed: int, dtype: torch.dtype, many_experts: Callable[[], Any]) -> None:
    torch.manual_seed(seed)
    pipeline = many_experts()
    pipeline.to(dtype)
    pipeline.set_progress_bar_config(disable=True)
    requests = [CASES["HiDreamImagePipeline"].request(i, seed=50 * seed + i) for i in range(2)]
    assert_shared(pipeline, requests)


def test_bits_of_experts_do_not_depend_on_company(many_experts: Callable[[], Any]) -> None:
    """With copies of itself for company an expert gets other numbers of tokens than with mates."""
    case = CASES["HiDreamImagePipeline"]

    def drawn(*others: int) -> Driver:
        torch.manual_seed(0)
        driver = Driver(Runner.from_pipeline(many_experts(), config(batch_invariant=True, max_batch=3)))
        driver.drain([case.request(0, seed=seed).with_id(f"r{seed}") for seed in (1, *others)])
        return driver

    company = drawn(2, 3)
    assert torch.equal(*(tensor_of(driver.finished["r1"].output) for driver in (company, drawn())))
    assert set(company.runner._hub.counters.denoiser_alone) == {BY_VALUES}
    assert fold(BY_VALUES) == "verification_failed"


class Staged(SD3Transformer2DModel):
    """Ends with one expert or another, by the timestep of each row; ``above``: of the first one."""

    above: float

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        (out,) = super().forward(*args, **{**kwargs, "return_dict": False})
        early, flat = kwargs["timestep"] > self.above, out.flatten(1)
        made = torch.empty_like(flat)
        for rows, expert in ((early, self.first), (~early, self.second)):
            if rows.any():
                made[rows] = flat[rows] + expert(flat[rows])
        return (made.view_as(out),)


@pytest.mark.parametrize("above", [40, 500, 960])
def test_bits_of_experts_by_timestep_do_not_depend_on_how_far_mates_are(above: float) -> None:
    def drawn(mates: int) -> Driver:
        pipeline = tiny.sd3()
        model = pipeline.transformer
        model.__class__, model.above = Staged, above
        torch.manual_seed(0)
        model.first, model.second = (torch.nn.Linear(1024, 1024) for _ in range(2))
        pipeline.set_progress_bar_config(disable=True)
        driver = Driver(Runner.from_pipeline(pipeline, config(batch_invariant=True, max_batch=3)))
        params = {"height": 32, "width": 32, "max_sequence_length": 16, "guidance_scale": 1.0}
        asked = [
            DiffusionRequest(
                "a cat", request_id=f"r{i}", seed=i, num_inference_steps=6 + i, output_type="latent", **params
            )
            for i in range(mates + 1)
        ]
        driver.drain(asked[::-1], joining=1)
        return driver

    company = drawn(2)
    assert torch.equal(*(tensor_of(driver.finished["r0"].output) for driver in (company, drawn(0))))
    assert set(company.runner._hub.counters.denoiser_alone) == {BY_VALUES}
