"""Executors of whole requests: the same engine, bounded by max_batch, cancelled by cancelling the call."""

from __future__ import annotations

import anyio
import pytest
from fakes import WholeFake, fake_engine, settled

from steploom import AsyncDiffusionEngine, DeadlineExceeded, DiffusionOutput, GenerationFailed, RequestCancelled
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
        assert (await engine.generate("a cat", style="ink")).output == ("a cat", {"style": "ink"})
        await engine.check_health()
