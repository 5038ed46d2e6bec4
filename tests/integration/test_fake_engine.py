"""steploom.testing: the engine's whole surface, in milliseconds, without torch."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import anyio
import numpy as np
import pytest
from anyio.from_thread import start_blocking_portal
from fakes import assert_empty

from steploom import (
    DiffusionRequest,
    EngineConfig,
    EngineDead,
    EngineNotRunning,
    GenerationFailed,
    InvalidRequest,
    QueueFull,
    RequestCancelled,
    StepEvent,
    WorkerDied,
)
from steploom.testing import FakeDiffusionEngine, FakeEngine


async def test_it_is_made_as_the_real_one_is() -> None:
    for engine in (
        FakeEngine(EngineConfig(max_batch=3), max_waiting=5),
        FakeEngine(max_batch=3, max_waiting=5),
        FakeEngine.from_pipeline(object(), max_batch=3, max_waiting=5),
    ):
        assert (engine.config.max_batch, engine.config.max_waiting) == (3, 5)
        async with engine:
            assert (await engine.generate(DiffusionRequest("a", seed=1))).seed == 1
        async with engine:  # and once more
            await engine.check_health()


async def test_latents_trajectories_and_arrays() -> None:
    async with FakeEngine() as engine:
        seen = {}
        async with engine.stream("a", num_inference_steps=4, width=32, latents_every=2, num_images_per_prompt=3) as run:
            async for event in run:
                if isinstance(event, StepEvent):
                    seen[event.step] = event.latents
            out = await run.result()
        assert seen[1] is None
        assert np.asarray(seen[2]).shape == (3, 4, 8, 4)
        assert np.asarray(seen[2]).dtype == np.float32
        assert len(out.images) == 3
        out = await engine.generate("a", num_inference_steps=4, return_trajectory=True, output_type="np")
        assert out.images.shape == (1, 64, 64, 3)
        assert 0 <= out.images.min() < out.images.max() <= 1
        assert np.asarray(out.trajectory_latents).shape == (4, 1, 4, 8, 8)
        assert list(np.asarray(out.trajectory_timesteps)) == [1000, 750, 500, 250]
        latents = await engine.generate("a", output_type="latent")
        assert np.asarray(latents.images).shape == (1, 4, 8, 8)


async def test_whatever_a_model_would_look_at_changes_the_picture() -> None:
    async with FakeEngine(loras={"ink": "./ink.safetensors"}) as engine:

        async def picture(**params: Any) -> bytes:
            return (await engine.generate("a", seed=1, **params)).images[0].tobytes()

        plain = await picture()
        assert plain == await picture(num_inference_steps=3)
        made = {plain, await picture(lora="ink"), await picture(lora=[("ink", 0.5)]), await picture(guidance_scale=2.0)}
        image = (await engine.generate("b")).images[0]
        made |= {await picture(negative_prompt="c"), await picture(image=image, task="image-to-image", strength=0.5)}
        assert len(made) == 6
        with pytest.raises(InvalidRequest, match="ink"):
            await picture(lora="oil")


async def test_a_full_queue_an_abort_and_sleep() -> None:
    async with FakeEngine(max_batch=1, max_resident=1, max_waiting=1) as engine, anyio.create_task_group() as group:
        engine.hold()
        ended: list[Exception] = []

        async def draw(request_id: str) -> None:
            try:
                await engine.generate("a", request_id=request_id)
            except RequestCancelled as error:
                ended.append(error)

        group.start_soon(draw, "one")
        await engine.held()
        group.start_soon(draw, "two")
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(QueueFull):
            await engine.generate("a")
        assert await engine.abort("two")
        assert not await engine.abort("three")
        assert await engine.abort("one")
        engine.release()
        await engine.sleep(level=2)
        with pytest.raises(EngineNotRunning, match="sleeps"):
            await engine.generate("a")
        await engine.wake_up()
        await engine.generate("a")
        assert len(ended) == 2
        assert_empty(engine)


async def test_calls_of_a_worker_extension_are_answered() -> None:
    async with FakeEngine(worker_extension="my.Extension") as engine:
        engine.answers["version"] = 3
        engine.answers["add"] = lambda a, b=0: a + b
        assert await engine.collective_rpc("version") == [3]
        assert await engine.collective_rpc("add", args=(1,), kwargs={"b": 2}, unique_reply_rank=0) == 3
        assert await engine.collective_rpc("ping", timeout=60) == ["pong"]
        with pytest.raises(GenerationFailed, match=r"engine\.answers\['other'\]"):
            await engine.collective_rpc("other")


async def test_the_worker_dies() -> None:
    async with FakeEngine() as engine:
        engine.hold()
        async with engine.stream("a") as run:
            await engine.held()
            engine.die()
            with pytest.raises(WorkerDied):
                await run.result()
        with pytest.raises(EngineDead):
            await engine.generate("a")
    engine.release()
    async with engine:  # a new worker
        await engine.generate("a")


def test_blocking_code_has_a_twin_and_may_hold_and_release() -> None:
    with FakeDiffusionEngine(max_batch=2) as engine:
        outputs = engine.step([DiffusionRequest("a", seed=1), DiffusionRequest("a", seed=1), DiffusionRequest("fail")])
        assert [output.error is None for output in outputs] == [True, True, False]
        assert outputs[0].images[0].tobytes() == outputs[1].images[0].tobytes()
        engine.check_health()
    with FakeDiffusionEngine.from_pipeline(object()) as engine:
        engine.fake.die()
        with pytest.raises((WorkerDied, EngineDead)):
            [engine.generate("a") for _ in range(1000)]


def test_a_test_may_hold_an_engine_of_another_thread() -> None:
    """As with Starlette's TestClient, whose application runs in a thread of its own."""
    engine = FakeEngine()
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(engine):
        engine.hold()
        future = portal.start_task_soon(engine.generate, "a")
        portal.call(engine.held)
        assert not future.done()
        engine.release()
        assert future.result(60).images


def test_neither_torch_nor_numpy_is_needed() -> None:
    """They are not even installed, as far as the application can tell; nor is it slow to import."""
    program = """
import asyncio, io, sys
for name in ("torch", "diffusers", "transformers", "numpy", "greenlet", "accelerate"):
    sys.modules[name] = None
from steploom.testing import FakeDiffusionEngine, FakeEngine
from steploom.server import create_app
import steploom.web

async def main():
    async with FakeEngine() as engine:
        create_app(engine)
        out = await engine.generate("a", return_trajectory=True)
        file = await steploom.web.png(out.images[0])
        for image in (file, out.images[0]):
            await engine.generate("a", image=image, task="image-to-image", strength=0.5)
        async for event in await steploom.web.sse(engine.stream("a", preview_every=1, latents_every=1)):
            pass
        assert event.startswith(b"event: finished"), event
        await engine.sleep()
asyncio.run(main())
with FakeDiffusionEngine() as engine:
    engine.generate("a")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
