"""Cancellation at every await leaves nothing behind, and 300 random lives neither."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import anyio
import pytest
from fakes import FakeExecutor, InProcessFake, WholeFake, assert_empty, fake_engine, settled
from interruption import at_every_await

from steploom import (
    AsyncDiffusionEngine,
    DeadlineExceeded,
    DiffusionOutput,
    EngineConfig,
    GenerationFailed,
    QueueFull,
    RequestCancelled,
    RequestError,
)


@pytest.mark.parametrize("kind", [FakeExecutor, WholeFake])
async def test_generate(kind: type[FakeExecutor]) -> None:
    async with fake_engine(kind) as (engine, executor):

        async def generate() -> None:
            async with anyio.create_task_group() as group:
                group.start_soon(_open_gates, executor)
                await engine.generate("a cat", num_inference_steps=3)
                group.cancel_scope.cancel()

        async def after() -> None:
            await settled(engine)
            assert_empty(engine)

        assert await at_every_await(generate if kind is WholeFake else _plain(engine), after) > 0


def _plain(engine: AsyncDiffusionEngine) -> Callable[[], Coroutine[Any, Any, Any]]:
    return lambda: engine.generate("a cat", num_inference_steps=3)


async def _open_gates(executor: WholeFake) -> None:
    """Lets every whole request end as soon as it runs."""
    while True:
        for gate in executor.gates.values():
            gate.set()
        await anyio.lowlevel.checkpoint()


async def test_stream() -> None:
    async with fake_engine(InProcessFake) as (engine, _):

        async def stream() -> None:
            async with engine.stream("a cat", num_inference_steps=5, latents_every=1) as run:
                async for _ in run:
                    pass
                await run.result()

        async def after() -> None:
            await settled(engine)
            assert_empty(engine)

        assert await at_every_await(stream, after) >= 2


async def test_start_and_close() -> None:
    made: list[AsyncDiffusionEngine] = []

    async def life() -> None:
        engine = AsyncDiffusionEngine(EngineConfig(distributed_executor_backend=FakeExecutor))
        made.append(engine)
        async with engine:
            await engine.generate("a cat", num_inference_steps=2)

    async def after() -> None:
        core = made[-1]._core
        assert core is None or (core.ended.is_set() and core.executor.shut == 1)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    assert await at_every_await(life, after) >= 3


async def test_the_calls_of_the_workers() -> None:
    async with fake_engine() as (engine, _):

        async def calls() -> None:
            await engine.check_health()
            await engine.collective_rpc("stats")
            await engine.sleep()
            await engine.wake_up()

        async def after() -> None:
            if engine._core.operations.asleep:  # wake_up itself was cancelled.
                await engine.wake_up()
            assert (await engine.generate("a cat")).images == ["a cat"]
            await settled(engine)
            assert_empty(engine)

        assert await at_every_await(calls, after) >= 4


async def test_three_hundred_random_arrivals_cancels_and_timeouts() -> None:
    rng = random.Random(0)
    outcomes: list[str] = []

    async def one(number: int) -> None:
        fate = rng.choice(["live", "cancel", "abort", "timeout", "fail", "stream"])
        params: dict[str, Any] = {"num_inference_steps": rng.randint(1, 30), "request_id": f"r{number}"}
        params |= {"timeout": rng.uniform(1e-6, 3e-3)} if fate == "timeout" else {}
        params |= {"fail_at": 1} if fate == "fail" else {}
        for _ in range(rng.randint(0, 300)):
            await anyio.lowlevel.checkpoint()
        with anyio.CancelScope() as scope:
            outcome = "cancelled"
            if fate in ("cancel", "abort"):
                group.start_soon(_later, rng.randint(0, 40), scope.cancel if fate == "cancel" else _abort(number))
            try:
                out = await _run(engine, f"cat {number}", fate, params)
                assert out.images == [f"cat {number}"]
                outcome = "finished"
            except RequestError as error:
                outcome = type(error).__name__
        outcomes.append(outcome)

    def _abort(number: int) -> Callable[[], Awaitable[bool]]:
        return lambda: engine.abort(f"r{number}")

    async with fake_engine(max_batch=4, max_resident=6, max_waiting=40) as (engine, executor):
        async with anyio.create_task_group() as group:
            for number in range(300):
                group.start_soon(one, number)
        await settled(engine)
        assert_empty(engine)
        assert executor.max_resident <= 6
    kinds = {"finished", "cancelled", *(k.__name__ for k in (RequestCancelled, DeadlineExceeded, GenerationFailed))}
    assert len(outcomes) == 300
    assert kinds <= set(outcomes) <= kinds | {QueueFull.__name__}


async def _run(engine: AsyncDiffusionEngine, prompt: str, fate: str, params: dict[str, Any]) -> DiffusionOutput:
    if fate != "stream":
        return await engine.generate(prompt, **params)
    async with engine.stream(prompt, preview_every=2, **params) as run:
        async for _ in run:
            pass
        return await run.result()


async def _later(turns: int, do: Callable[[], Any]) -> None:
    """Does it after some turns of the event loop."""
    for _ in range(turns):
        await anyio.lowlevel.checkpoint()
    done = do()
    if done is not None:
        await done
