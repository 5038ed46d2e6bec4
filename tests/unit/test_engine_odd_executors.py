"""Executors by hand that end, cancel or answer what they should not: whoever is to blame is named, nothing is left."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import anyio
import pytest
from fakes import FakeExecutor, WholeFake, assert_empty

from steploom import (
    AsyncDiffusionEngine,
    DiffusionOutput,
    EngineDead,
    EngineError,
    EngineNotRunning,
    GenerationFailed,
    QueueFull,
    RequestCancelled,
)
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


def output(request: Any, **told: Any) -> DiffusionOutput:
    return DiffusionOutput(request_id=request.request_id, **told)


def raises(error: BaseException) -> Any:
    def answer(request: Any) -> Any:
        raise error

    return answer


class Odd(WholeFake):
    """Answers ``"bad"`` as the test says, and others at once."""

    answer: Any = None

    async def execute_model(self, requests: Any) -> Any:
        if requests[0].prompt == "bad":
            return type(self).answer(requests[0])
        return [output(requests[0], output="good")]


@pytest.mark.parametrize(
    ("answer", "kind", "said"),
    [
        (lambda one: None, GenerationFailed, r"Odd\.execute_model\(\) answered a NoneType: must be a list of one"),
        (lambda one: output(one, output=1), GenerationFailed, "answered a DiffusionOutput: must be a list of one"),
        (lambda one: [], GenerationFailed, r"answered a list of \[\]: must be a list of one"),
        (lambda one: ["x"], GenerationFailed, r"answered a list of \['str'\]: must be a list of one"),
        (lambda one: [output(one, output=1)] * 2, GenerationFailed, "answered a list of .* for the one request"),
        (lambda one: [output(one)], GenerationFailed, "answered neither an output nor an error"),
        (lambda one: [DiffusionOutput(request_id="x", output=1)], GenerationFailed, "'x', where it was asked 'bad'"),
        (lambda one: [output(one, error="boom")], GenerationFailed, "answered error='boom': must be an exception"),
        (lambda one: [output(one, error=ValueError("v"))], GenerationFailed, "ValueError: v"),
        (lambda one: [output(one, error=EngineError("busy"))], EngineError, "busy"),
        (lambda one: [output(one, error=QueueFull("full", retry_after_s=3))], QueueFull, "full"),
        (raises(QueueFull("full", retry_after_s=3)), QueueFull, "full"),
        (lambda one: [output(one, error=RequestCancelled("late", drained=True))], RequestCancelled, "late"),
        (raises(GeneratorExit()), GenerationFailed, r"Odd\.execute_model\(\) raised GeneratorExit"),
        (raises(BaseExceptionGroup("g", [GeneratorExit()])), GenerationFailed, r"raised BaseExceptionGroup: g \(1 sub"),
    ],
)  # fmt: skip
async def test_an_odd_answer_is_told_in_words_and_is_one_requests_failure(answer: Any, kind: Any, said: str) -> None:
    Odd.answer = staticmethod(answer)
    async with engine_of(Odd) as engine:
        outcomes = asyncio.gather(
            *(engine.generate(name, request_id=name) for name in ("good", "bad", "other")), return_exceptions=True
        )
        good, bad, other = await outcomes
        assert (good.output, other.output) == ("good", "good")
        assert type(bad) is kind
        assert re.search(said, str(bad))
        assert getattr(bad, "retry_after_s", 3) == 3
        assert getattr(bad, "drained", True)
        assert (await engine.generate("later")).output == "good"
    assert not others()


class Lost(Odd):
    """Could be replaced, if it were lost."""

    recovered = 0

    def discard(self, fault: EngineError) -> bool:
        return True

    async def recover(self) -> None:
        type(self).recovered += 1


async def test_who_answers_an_engine_error_is_not_lost() -> None:
    Odd.answer = staticmethod(lambda one: [output(one, error=EngineError("busy"))])
    async with engine_of(Lost) as engine:
        with pytest.raises(EngineError, match="busy"):
            await engine.generate("bad")
        assert Lost.recovered == 0


class Exits(FakeExecutor):
    async def execute_step(self, output: Any) -> Any:
        raise BaseExceptionGroup("all of them", [GeneratorExit("gone")])


def test_what_is_asked_when_the_loop_is_dropped_is_closed_in_silence() -> None:
    part = asked(asyncio.sleep, 3600)
    loop = asyncio.new_event_loop()
    try:
        task = loop.create_task(part)
        loop.run_until_complete(asyncio.sleep(0))
        part.close()
        task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
    finally:
        loop.close()


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
        (Exits, r"Exits\.execute_step\(\) raised BaseExceptionGroup: all of them"),
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
