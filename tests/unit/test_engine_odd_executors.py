"""Executors by hand that end, cancel or answer what they should not: whoever is to blame is named, nothing is left."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import anyio
import pytest
from fakes import FakeExecutor, WholeFake, assert_empty

from steploom import AsyncDiffusionEngine, EngineDead, EngineError, EngineNotRunning, GenerationFailed
from steploom.engine.asked import asked
from steploom.executor.abstract import DiffusionExecutor


def others() -> set[Any]:
    return asyncio.all_tasks() - {asyncio.current_task()}


async def cancelled_by_a_library() -> Any:
    future = asyncio.get_running_loop().create_future()
    future.cancel("connection closed")
    await future


def engine_of(kind: type[DiffusionExecutor], **config: Any) -> AsyncDiffusionEngine:
    return AsyncDiffusionEngine(distributed_executor_backend=kind, **{"costs_file": None, **config})


class OneBad(WholeFake):
    async def execute_model(self, requests: Any) -> Any:
        if requests[0].prompt == "bad":
            await cancelled_by_a_library()
        return await super().execute_model(requests)


async def test_a_future_that_a_library_cancels_fails_the_request_whose_call_awaits_it() -> None:
    async with engine_of(OneBad) as engine:
        prompts = ("good", "bad", "also good")
        outcomes = asyncio.gather(*(engine.generate(prompt) for prompt in prompts), return_exceptions=True)
        await anyio.wait_all_tasks_blocked()
        for gate in engine._core.executor.gates.values():
            gate.set()
        one, bad, other = await outcomes
        assert (one.images, other.images) == (["good"], ["also good"])
        assert isinstance(bad, GenerationFailed)
        assert "OneBad.execute_model() raised CancelledError: connection closed" in str(bad)
        assert engine.serves
    assert_empty(engine)
    assert not others()


class Cancels(FakeExecutor):
    async def execute_step(self, output: Any) -> Any:
        await cancelled_by_a_library()


class Nothing(FakeExecutor):
    async def execute_step(self, output: Any) -> Any:
        return None


class Speechless(FakeExecutor):
    async def execute_step(self, output: Any) -> Any:
        raise NotImplementedError


class Watchless(FakeExecutor):
    async def wait_failed(self, worker: int = 0) -> EngineError:
        return await cancelled_by_a_library()


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Cancels, r"Cancels\.execute_step\(\) raised CancelledError: connection closed, though nobody"),
        (Nothing, r"Nothing\.execute_step\(\) returned NoneType: must be a RunnerOutput"),
        (Speechless, r"NotImplementedError: raised at .*odd_executors\.py:\d+, in execute_step"),
    ],
)
async def test_what_an_executor_did_is_what_the_engine_died_of(kind: type[FakeExecutor], said: str) -> None:
    engine = await engine_of(kind).start()
    with pytest.raises(EngineDead, match=said):
        await engine.generate("a cat")
    assert isinstance(await engine.wait_ended(), EngineDead)
    assert not engine.serves
    with pytest.raises(EngineDead, match=said):
        await engine.generate("later")
    assert not others()


class Calls(FakeExecutor):
    async def collective_rpc(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        await cancelled_by_a_library()


async def test_a_call_raises_no_cancellation_that_its_caller_did_not_ask_for() -> None:
    async with engine_of(Calls) as engine:
        with pytest.raises(RuntimeError, match="raised CancelledError"):
            await engine.collective_rpc("ping")
        assert (await engine.generate("a cat")).images == ["a cat"]


async def test_an_engine_whose_task_was_cancelled_does_not_say_that_it_serves() -> None:
    engine = await engine_of(FakeExecutor).start()
    (owner,) = engine._owners
    owner.cancel()
    await engine.wait_ended()
    assert not engine.serves
    with pytest.raises(EngineNotRunning):
        await engine.generate("a cat")


async def test_a_cancellation_that_meets_another_one_is_its_callers() -> None:
    with anyio.CancelScope() as scope:
        scope.cancel()
        with pytest.raises(asyncio.CancelledError, match="connection closed"):
            await asked(cancelled_by_a_library)


class Unloaded(FakeExecutor):
    async def _init_executor(self, on_progress: Any) -> Any:
        return None


class Unreached(FakeExecutor):
    async def _init_executor(self, on_progress: Any) -> Any:
        return await cancelled_by_a_library()


class Hanging(FakeExecutor):
    async def _init_executor(self, on_progress: Any) -> Any:
        await anyio.sleep_forever()


class Late(FakeExecutor):
    async def _init_executor(self, on_progress: Any) -> Any:
        raise TimeoutError("the remote is late")


class StillBorn(FakeExecutor):
    async def wait_failed(self, worker: int = 0) -> EngineError:
        return EngineError("gone at once")

    async def shutdown(self) -> None:
        for _ in range(5000):  # longer than the file takes to be read
            await anyio.lowlevel.checkpoint()
        await super().shutdown()


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Unloaded, r"Unloaded\.start\(\) returned NoneType: must be a PipelineInfo"),
        (Unreached, r"Unreached\.start\(\) raised CancelledError: connection closed"),
        (Hanging, r"start_timeout_s=0\.05: model='demo' was not loaded in time"),
        (Late, "TimeoutError: the remote is late"),
        (StillBorn, "gone at once"),
        (Watchless, r"Watchless\.wait_failed\(\) raised CancelledError"),
    ],
)
async def test_a_start_that_fails_leaves_nothing_behind(kind: type[FakeExecutor], said: str, tmp_path: Path) -> None:
    engine = engine_of(kind, start_timeout_s=0.05, costs_file=str(tmp_path / "costs"))  # whose reading takes a while
    with pytest.raises(EngineError, match=said):
        await engine.start()
    assert not engine.serves
    assert not others(), "not only about to end"
