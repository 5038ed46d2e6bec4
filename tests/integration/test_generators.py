"""``generator=`` over worker processes: drawn from there as ``pipe(...)`` would here, and left where it leaves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest
import torch
from diffusers import DiffusionPipeline

from steploom import AsyncDiffusionEngine, StepEvent
from steploom.requests import Restarted

PROMPTS = ["a cat", "two dogs"]
PARAMS: dict[str, Any] = {"num_inference_steps": 6, "output_type": "latent"}


@pytest.fixture(scope="module")
def alone(tiny_model: Path) -> Any:
    pipe = DiffusionPipeline.from_pretrained(tiny_model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def one() -> Any:
    """A generator that has been drawn from already."""
    generator = torch.Generator().manual_seed(7)
    torch.rand(3, generator=generator)
    return generator


def each() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in (7, 8)]


def shared() -> list[torch.Generator]:
    """One generator for both images: they draw from it in turn."""
    return [one()] * 2


def states(given: Any) -> list[torch.Tensor]:
    return [generator.get_state() for generator in (given if isinstance(given, list) else [given])]


def as_alone(pipe: Any, output: Any, given: Any, made: Any) -> None:
    """What ``given`` has made is what ``pipe(...)`` makes of ``made()``, and both are drawn from as far."""
    there = made()
    expected = pipe(PROMPTS, generator=there, **PARAMS).images
    assert torch.allclose(output.images, expected, atol=1e-4)
    assert not torch.allclose(output.images, pipe(PROMPTS, generator=each()[1], **PARAMS).images, atol=0.1)
    assert all(map(torch.equal, states(given), states(there)))
    assert not any(map(torch.equal, states(given), states(made())))


@pytest.mark.slow
@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.parametrize("made", [one, each, shared])
async def test_a_request_draws_as_alone_and_leaves_its_generators_advanced(engine: Any, alone: Any, made: Any) -> None:
    given = made()
    async with anyio.create_task_group() as group:
        for seed in range(2):
            group.start_soon(lambda seed: engine.generate("a hen", seed=seed, num_inference_steps=4), seed)
        output = await engine.generate(PROMPTS, generator=given, **PARAMS)
    assert output.timings.mean_batch_requests > 1
    as_alone(alone, output, given, made)


@pytest.mark.slow
@pytest.mark.parametrize("made", [one, shared])
async def test_a_killed_workers_request_draws_again_from_where_it_was_accepted(
    tiny_model: Path, alone: Any, made: Any
) -> None:
    given, attempts = made(), 1
    before = set(psutil.Process().children())
    async with AsyncDiffusionEngine(model=str(tiny_model), torch_threads=1) as engine:
        (worker,) = set(psutil.Process().children()) - before
        async with engine.stream(PROMPTS, generator=given, **PARAMS) as run:
            accepted = states(given)
            async for event in run:
                if isinstance(event, StepEvent) and event.step == 3 and attempts == 1:
                    worker.kill()
                    torch.rand(5, generator=(given if made is one else given[0]))  # which is none of its business
                if isinstance(event, Restarted):
                    attempts += 1
            output = await run.result()
    assert attempts == 2
    assert all(map(torch.equal, accepted, states(made())))
    as_alone(alone, output, given, made)
