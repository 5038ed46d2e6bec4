"""The engine over a real pipeline, in a worker process and in this one: what comes out, and what is left behind."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
from fakes import assert_empty, settled
from interruption import HOWS, interrupted
from PIL import Image

from steploom import (
    AsyncDiffusionEngine,
    DeadlineExceeded,
    Finished,
    InvalidRequest,
    Queued,
    RequestCancelled,
    RequestError,
    StepEvent,
)

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def resident(engine: Any) -> int:
    """How many programs the worker holds."""
    return (await engine.collective_rpc("stats", timeout=60, unique_reply_rank=0)).resident


@pytest.fixture(scope="session")
def alone(tiny_model: Path) -> Any:
    """The same model as stock diffusers runs it."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(tiny_model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def expected(pipe: Any, prompt: str, seed: int, **params: Any) -> np.ndarray:
    import torch

    generator = torch.Generator("cpu").manual_seed(seed)
    return np.asarray(pipe(prompt, generator=generator, **params).images[0], np.int16)


async def test_requests_in_company_are_as_alone(engine: Any, alone: Any) -> None:
    asked = {f"cat {n}": {"num_inference_steps": 3 + n % 4, "guidance_scale": 1.0 + n} for n in range(6)}
    outs: dict[str, Any] = {}

    async def one(seed: int, prompt: str) -> None:
        outs[prompt] = await engine.generate(prompt, seed=seed, **asked[prompt])

    async with anyio.create_task_group() as group:
        for seed, prompt in enumerate(asked):
            group.start_soon(one, seed, prompt)
    assert max(out.timings.mean_batch_requests for out in outs.values()) > 2
    for seed, (prompt, params) in enumerate(asked.items()):
        image, out = outs[prompt].images[0], outs[prompt]
        assert isinstance(image, Image.Image)
        assert np.abs(np.asarray(image, np.int16) - expected(alone, prompt, seed, **params)).max() <= 1
        assert out.seed == seed
        assert out.timings.steps == params["num_inference_steps"]
        assert 0 < out.timings.denoise_s < out.timings.total_s
    assert np.asarray(outs["cat 0"].images[0]).std() > 1


async def test_a_stream_brings_latents_and_previews(engine: Any) -> None:
    async with engine.stream("a cat", seed=1, num_inference_steps=6, latents_every=1, preview_every=3) as run:
        events = [event async for event in run]
        out = await run.result()
    assert isinstance(events[0], Queued)
    assert isinstance(events[-1], Finished)
    assert events[-1].output is out
    steps = [event for event in events if isinstance(event, StepEvent)]
    assert [event.step for event in steps] == sorted({event.step for event in steps})
    assert steps[-1].step == steps[-1].total_steps == 6
    assert steps[-1].sigma == pytest.approx(0.0)
    assert tuple(steps[-1].latents.shape) == (1, 4, 16, 16)
    assert all(isinstance(event.preview, Image.Image) for event in steps if event.step % 3 == 0)


async def test_trajectories_and_output_types(engine: Any) -> None:
    params = {"seed": 2, "num_inference_steps": 4, "num_images_per_prompt": 2}
    latent = await engine.generate("a cat", return_trajectory=True, output_type="latent", **params)
    assert tuple(latent.trajectory_latents.shape) == (4, 2, 4, 16, 16)
    assert len(latent.trajectory_timesteps) == 4
    assert np.allclose(latent.trajectory_latents[-1].float(), latent.images.float(), atol=1e-5)
    array = await engine.generate("a cat", output_type="np", **params)
    assert array.images.shape == (2, 32, 32, 3)


async def test_an_argument_that_cannot_travel_is_refused_only_where_it_travels(
    mp_engine: Any, inproc_engine: Any
) -> None:
    import torch

    seen: list[int] = []

    def count(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        return {}

    params = {"num_inference_steps": 3, "callback_on_step_end": count}
    await inproc_engine.generate("a cat", generator=torch.Generator().manual_seed(1), **params)
    assert seen == [0, 1, 2]
    with pytest.raises(InvalidRequest, match=r"callback_on_step_end.*inproc"):
        await mp_engine.generate("a cat", **params)


async def test_a_generator_is_read_at_acceptance_and_left_advanced(engine: Any) -> None:
    import torch

    own, params = torch.Generator().manual_seed(5), {"num_inference_steps": 2, "output_type": "latent"}
    seeded = (await engine.generate("a cat", seed=5, **params)).images

    async with anyio.create_task_group() as group:  # accepted together: the same state for both

        async def run() -> None:
            out = await engine.generate("a cat", generator=own, **params)
            assert torch.allclose(out.images, seeded, atol=1e-5)

        group.start_soon(run)
        group.start_soon(run)
    drawn = torch.Generator().manual_seed(5)
    torch.randn(seeded.shape, generator=drawn)
    assert torch.equal(own.get_state(), drawn.get_state())
    later = await engine.generate("a cat", generator=own, **params)
    assert not torch.allclose(later.images, seeded, atol=1e-1)


async def test_two_engines_in_one_loop(mp_engine: Any, inproc_engine: Any) -> None:
    outs: list[Any] = []

    async def one(engine: Any) -> None:
        outs.append(await engine.generate("a cat", seed=5, num_inference_steps=4))

    async with anyio.create_task_group() as group:
        for engine in (mp_engine, inproc_engine, mp_engine, inproc_engine):
            group.start_soon(one, engine)
    images = [np.asarray(out.images[0], np.int16) for out in outs]
    assert all(np.abs(image - images[0]).max() <= 1 for image in images)


async def test_sleeping_and_waking_changes_nothing(engine: Any) -> None:
    before = await engine.generate("a cat", seed=3, num_inference_steps=3, output_type="np")
    await engine.sleep()
    await engine.wake_up()
    after = await engine.generate("a cat", seed=3, num_inference_steps=3, output_type="np")
    assert np.abs(before.images - after.images).max() < 1e-5


async def test_cancelled_at_any_await_nothing_is_left(engine: Any) -> None:
    for how in HOWS:
        for n in range(4):
            async with engine.stream("company", num_inference_steps=2) as company:
                await interrupted(_read(engine), n, how)
                await company.result()
    await settled(engine)
    assert_empty(engine)
    assert await resident(engine) == 0


async def _read(engine: Any) -> None:
    async with engine.stream("a cat", num_inference_steps=3, latents_every=1) as run:
        async for _ in run:
            pass


async def test_three_hundred_random_lives(engine: Any) -> None:
    rng = random.Random(1)
    fates = [rng.choice(["live", "live", "cancel", "abort", "timeout", "wrong"]) for _ in range(300)]
    outcomes: dict[int, str] = {}

    async def client() -> None:
        while fates:
            number, fate = len(fates), fates.pop()
            try:
                outcome = await _one_life(engine, fate, rng)
            except RequestError as error:
                outcome = type(error).__name__
            assert number not in outcomes
            outcomes[number] = outcome

    async with anyio.create_task_group() as group:
        for _ in range(30):
            group.start_soon(client)
    kinds = {"finished", "cancelled", *(k.__name__ for k in (RequestCancelled, DeadlineExceeded, InvalidRequest))}
    assert len(outcomes) == 300
    assert set(outcomes.values()) == kinds
    await settled(engine)
    assert_empty(engine)
    assert await resident(engine) == 0


async def _one_life(engine: AsyncDiffusionEngine, fate: str, rng: random.Random) -> str:
    params: dict[str, Any] = {"num_inference_steps": rng.randint(1, 4), "guidance_scale": rng.choice([1.0, 4.0])}
    if fate == "timeout":
        params["timeout"] = rng.uniform(0.001, 0.5)
    if fate == "wrong":
        params["width"] = 33
    patience = rng.randint(0, 3)
    async with engine.stream("a cat", **params) as run:
        async for _ in run:
            patience -= 1
            if patience < 0 and fate == "cancel":
                return "cancelled"
            if patience < 0 and fate == "abort":
                await engine.abort(run.request_id)
        await run.result()
    return "finished"
