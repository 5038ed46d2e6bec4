"""Executors of whole requests: the same engine, bounded by max_batch, cancelled by cancelling the call."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from fakes import WholeFake, fake_engine, settled

from steploom import (
    AsyncDiffusionEngine,
    DeadlineExceeded,
    DiffusionOutput,
    DiffusionRequest,
    EngineConfig,
    EngineError,
    EngineNotRunning,
    GenerationFailed,
    RequestCancelled,
    TickTimeout,
    WorkerDied,
)
from steploom.executor import DiffusionExecutor
from steploom.protocol import PipelineInfo


async def test_at_most_max_batch_run_and_each_place_is_taken_again() -> None:
    outs: dict[str, list[str]] = {}

    async def one(name: str, width: int) -> None:
        outs[name] = (await engine.generate(name, width=width)).images

    async with fake_engine(WholeFake, max_batch=3) as (engine, executor), anyio.create_task_group() as group:
        for number in range(9):  # Three sizes: three batch keys, which must not keep each other out.
            group.start_soon(one, str(number), 64 * (number % 3 + 1))
            await anyio.wait_all_tasks_blocked()
        for done in range(9):
            assert len(executor.gates) == min(3, 9 - done)
            next(iter(executor.gates.values())).set()
            await anyio.wait_all_tasks_blocked()
    assert outs == {str(n): [str(n)] for n in range(9)}
    assert executor.max_resident == 3


async def test_another_key_joins_while_one_runs() -> None:
    async with fake_engine(WholeFake, max_batch=2) as (engine, executor), anyio.create_task_group() as group:
        group.start_soon(lambda: engine.generate("long", width=64))
        await anyio.wait_all_tasks_blocked()
        group.start_soon(lambda: engine.generate("other", width=128))
        await anyio.wait_all_tasks_blocked()
        assert set(executor.gates) == {"long", "other"}
        for gate in executor.gates.values():
            gate.set()


async def test_an_error_is_the_requests_own() -> None:
    async with fake_engine(WholeFake) as (engine, executor), anyio.create_task_group() as group:

        async def bad() -> None:
            with pytest.raises(GenerationFailed, match="ValueError: bad luck"):
                await engine.generate("bad", fail_at=1)

        group.start_soon(bad)
        async with engine.stream("good") as run:
            await anyio.wait_all_tasks_blocked()
            executor.gates["bad"].set()
            executor.gates["good"].set()
            assert (await run.result()).images == ["good"]


async def test_ending_a_request_from_outside_cancels_its_call() -> None:
    async with fake_engine(WholeFake) as (engine, executor):
        async with engine.stream("left"):
            await anyio.wait_all_tasks_blocked()
        async with engine.stream("aborted") as run:
            await anyio.wait_all_tasks_blocked()
            await engine.abort(run.request_id)
            with pytest.raises(RequestCancelled):
                await run.result()
        with pytest.raises(DeadlineExceeded):
            await engine.generate("late", timeout=0.01)
        await settled(engine)
        await anyio.wait_all_tasks_blocked()
        assert executor.cancelled == ["left", "aborted", "late"]
        assert not executor.gates


async def test_closing_cancels_what_runs() -> None:
    async with fake_engine(WholeFake) as (engine, executor):
        run = engine.stream("running")
        await run.__aenter__()
        await anyio.wait_all_tasks_blocked()
        await engine.close()
        assert executor.cancelled == ["running"]
        with pytest.raises(RequestCancelled, match="closed"):
            await run.result()


class Least(DiffusionExecutor):
    """No more than an executor of whole requests needs."""

    async def _init_executor(self, on_progress):
        return PipelineInfo(pipeline_class="Remote")

    async def execute_model(self, requests):
        return [DiffusionOutput(request_id=one.request_id, output=(one.prompt, one.params)) for one in requests]

    async def collective_rpc(self, method, timeout=None, args=(), kwargs=None, unique_reply_rank=None):
        return [method]

    async def shutdown(self):
        pass


async def test_an_executor_need_not_say_what_follows() -> None:
    assert (Least.granularity, DiffusionExecutor.granularity) == ("request", "step")
    async with AsyncDiffusionEngine(distributed_executor_backend=Least) as engine:
        out = await engine.generate("a cat", style="ink", output_type="latent")
        assert (out.output, out.output_type) == (("a cat", {"style": "ink"}), "latent")
        await engine.check_health()


class Silent(Least):
    """It answers no calls, as long as it may."""

    async def collective_rpc(self, method, timeout=None, args=(), kwargs=None, unique_reply_rank=None):
        with anyio.fail_after(timeout):
            await anyio.sleep_forever()


async def test_what_its_calls_may_take_is_bounded_for_it() -> None:
    bounds = {"start_timeout_s": 0.02, "tick_timeout_s": 0.01}
    async with AsyncDiffusionEngine(distributed_executor_backend=Silent, **bounds) as engine:
        for call, setting in (("check_health", "tick"), ("sleep", "start"), ("wake_up", "start")):
            with pytest.raises(EngineError, match=f"within {setting}_timeout_s=0"):
                await getattr(engine, call)()
        assert not engine.asleep


class Mortal(WholeFake):
    """A remote that dies once, with all who wait for it; each way by which that is told has an event of its own."""

    def __init__(self, config: EngineConfig, pipeline: Any = None) -> None:
        super().__init__(config, pipeline)
        self.calls_hear, self.watch_hears = anyio.Event(), anyio.Event()
        self.discarded: list[EngineError] = []
        self.recovered = 0

    async def execute_model(self, requests: list[DiffusionRequest]) -> list[DiffusionOutput]:
        if not self.recovered:
            await self.calls_hear.wait()
            raise WorkerDied(0, 1, "the remote is gone")
        return [DiffusionOutput(request_id=requests[0].request_id, output=SimpleNamespace(images=["served"]))]

    async def wait_failed(self) -> EngineError:
        await self.watch_hears.wait()
        return WorkerDied(0, 1, "the remote is gone")

    def discard(self, fault: EngineError) -> bool:
        self.discarded.append(fault)
        self.watch_hears = anyio.Event()
        return True

    async def recover(self) -> None:
        self.recovered += 1


@pytest.mark.parametrize("first", ["calls_hear", "watch_hears"])
async def test_what_a_remote_held_when_it_died_is_replayed_whoever_hears_first(first: str) -> None:
    outs: list[list[str]] = []

    async def one(name: str) -> None:
        outs.append((await engine.generate(name)).images)

    async with fake_engine(Mortal) as (engine, executor), anyio.create_task_group() as group:
        for number in range(4):
            group.start_soon(one, str(number))
        await anyio.wait_all_tasks_blocked()
        getattr(executor, first).set()
    assert outs == [["served"]] * 4
    assert [type(fault) for fault in executor.discarded] == [WorkerDied]
    assert executor.recovered == 1


class Stubborn(Mortal):
    """Ends the calls that are cancelled with an error of its own."""

    async def execute_model(self, requests: list[DiffusionRequest]) -> list[DiffusionOutput]:
        try:
            return await super().execute_model(requests)
        except anyio.get_cancelled_exc_class():
            raise EngineNotRunning("cancelled") from None


async def test_what_a_call_raises_that_nobody_waits_for_is_no_fault() -> None:
    async with fake_engine(Stubborn) as (engine, executor):
        async with engine.stream("left"):
            await anyio.wait_all_tasks_blocked()
        await settled(engine)
        await anyio.wait_all_tasks_blocked()
        assert not executor.discarded


class Unavailable(Least):
    """Is too busy for ``"no"``."""

    async def execute_model(self, requests):
        if requests[0].prompt == "no":
            raise TickTimeout("the remote is busy")
        if requests[0].prompt == "dead":
            raise WorkerDied(0, 1, "its worker is gone")
        return await super().execute_model(requests)


async def test_an_engine_error_of_what_cannot_be_replaced_keeps_its_kind_and_is_the_requests() -> None:
    async with AsyncDiffusionEngine(distributed_executor_backend=Unavailable) as engine:
        with pytest.raises(TickTimeout, match="the remote is busy"):
            await engine.generate("no")
        with pytest.raises(EngineError, match="its worker is gone"):
            await engine.generate("dead")
        assert (await engine.generate("yes")).output == ("yes", {})


class Narrator(WholeFake):
    """Makes a video with sound and words."""

    async def execute_model(self, requests: list[DiffusionRequest]) -> list[DiffusionOutput]:
        (request,) = requests
        output = SimpleNamespace(frames=[["frame"]], audios=["sound"])
        told: dict[str, Any] = {"frame_rate": 24.0, "sampling_rate": 48_000, "texts": ["a boat"]}
        return [DiffusionOutput(request_id=request.request_id, seed=request.seed, output=output, **told)]


async def test_what_is_told_beside_the_output_arrives() -> None:
    async with fake_engine(Narrator) as (engine, _):
        out = await engine.generate("a boat")
    assert (out.frame_rate, out.sampling_rate, out.texts) == (24.0, 48_000, ["a boat"])
    assert (out.videos, out.text) == ([["frame"]], "a boat")
