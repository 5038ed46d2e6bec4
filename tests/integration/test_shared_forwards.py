"""Ranks that share each forward of a real transformer, by Ulysses over gloo: equal to ``pipe(...)`` alone."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
import torch
from processes import content, gone

from steploom import AsyncDiffusionEngine
from steploom.errors import ConfigError, InvalidRequest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]  # each process imports torch and diffusers

SMALL: dict[str, Any] = {"height": 32, "width": 32, "output_type": "latent", "max_sequence_length": 16}
MIXED: list[tuple[str, dict[str, Any]]] = [
    ("a cat", {"num_inference_steps": 4, "guidance_scale": 3.5}),
    ("dogs", {"num_inference_steps": 6, "guidance_scale": 1.0}),
    ("x", {"num_inference_steps": 5, "guidance_scale": 7.0}),
    ("odd", {"num_inference_steps": 3, "height": 36, "width": 36}),  # 81 tokens, which no two ranks share evenly
]
TOLERANCE = 1e-4


class Faulty:
    """An extension whose ranks can be told to fail."""

    def fail_in(self, rank: int) -> None:
        from steploom.worker.ranks import spmd as ranks

        here = ranks.here()
        assert here is not None

        def fail(*_: Any) -> None:
            raise RuntimeError(f"rank {here.index} alone")

        if here.index == rank:
            self.runner.pipeline.transformer.register_forward_pre_hook(fail)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[torch.Tensor]]:
    """A model's folder, and what its requests come to."""
    folder = tmp_path_factory.mktemp("tiny-flux")
    pipe = tiny.flux()
    pipe.save_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        return folder, [
            pipe(prompt, generator=torch.Generator("cpu").manual_seed(seed), return_dict=False, **SMALL | own)[0]
            for seed, (prompt, own) in enumerate(MIXED)
        ]


@pytest.fixture(autouse=True)
def others(temporary: Path) -> Iterator[list[psutil.Process]]:
    """Processes of other tests' engines, which run on; of those of this test nothing is left."""
    before = psutil.Process().children(recursive=True)
    yield before
    assert below(before) == []
    assert content(temporary) == []


def below(others: list[psutil.Process]) -> list[psutil.Process]:
    """The workers of this test's engine, each before its ranks."""
    return [process for process in psutil.Process().children(recursive=True) if process not in others]


def engine_of(folder: Path, **config: Any) -> AsyncDiffusionEngine:
    own = {"torch_threads": 1, "max_batch": 4, "costs_file": None, "restart_backoff_s": 0.001, **config}
    return AsyncDiffusionEngine(model=str(folder), **{"ulysses_degree": 2, **own})


async def all_equal(engine: AsyncDiffusionEngine, expected: list[torch.Tensor]) -> list[float]:
    """Asks for all at once; how many have shared the forwards of each."""
    running = [engine.generate(prompt, seed=seed, **SMALL | own) for seed, (prompt, own) in enumerate(MIXED)]
    outputs = await asyncio.gather(*running)
    scale = max(float(one.abs().max()) for one in expected)
    assert float((expected[0] - expected[1]).abs().max()) > 20 * TOLERANCE * scale
    for output, one in zip(outputs, expected, strict=True):
        assert float((output.output.images - one).abs().max()) < TOLERANCE * scale
    return [output.timings.mean_batch_requests for output in outputs]


async def test_unlike_requests_share_forwards_that_ranks_share(
    flux: Any, temporary: Path, others: list[psutil.Process]
) -> None:
    folder, expected = flux
    async with engine_of(folder) as engine:
        assert len(below(others)) == 2
        shared = await all_equal(engine, expected)
        assert min(shared[:3]) > 2
        with pytest.raises(InvalidRequest, match="prompt_embeds"):  # in a forward, in all ranks alike
            await engine.generate(
                prompt_embeds=torch.zeros(1, 16, 7), pooled_prompt_embeds=torch.zeros(1, 32), seed=1, **SMALL
            )
        async with asyncio.TaskGroup() as group:
            group.create_task(all_equal(engine, expected))
            async with engine.stream("gone", seed=9, num_inference_steps=1000, **SMALL) as run:
                async for event in run:
                    if getattr(event, "step", 0) >= 2:
                        break  # leaving it cancels it
            async with engine.stream("long", seed=9, num_inference_steps=6, **SMALL) as run:
                first, *rest = below(others)
                async for event in run:
                    if getattr(event, "step", 0) == 2 and rest:
                        os.kill(rest.pop().pid, signal.SIGKILL)
                await run.result()
        await gone(first)
        await all_equal(engine, expected)
        (folder,) = content(temporary)
        assert len(content(folder)) == 2, "a socket, and where ranks meet: nothing of those who were killed"


async def test_a_fault_of_one_rank_alone_ends_the_worker_and_no_request(
    flux: Any, others: list[psutil.Process]
) -> None:
    folder, expected = flux
    async with engine_of(folder, worker_extension=f"{__name__}.Faulty") as engine:
        before = below(others)
        await engine.collective_rpc("fail_in", args=(1,))
        await all_equal(engine, expected)
        assert below(others)[0] != before[0]


async def test_asleep_and_awake_again_ranks_share_what_was_loaded_anew(flux: Any) -> None:
    folder, expected = flux
    async with engine_of(folder, data_parallel_size=2) as engine:
        for level in (1, 2):
            await engine.sleep(level)
            await engine.wake_up()
            await all_equal(engine, expected)
        await all_equal(engine, expected)


@pytest.mark.parametrize(("settings", "said"), [
    ({}, "ulysses_degree=2: SD3Transformer2DModel .*has no _cp_plan.*data_parallel_size"),
    ({"ulysses_degree": 1, "tensor_parallel_size": 2}, "tensor_parallel_size=2: .*on GPUs only.*ulysses_degree"),
], ids=["plan", "device"])  # fmt: skip
async def test_a_model_that_cannot_is_refused_at_the_start(tiny_model: Path, settings: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        async with engine_of(tiny_model, **settings):
            raise AssertionError("it has started")
