"""Operations of an engine with several workers: each has its own ticks, and all of them stop, end, or are replaced."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
from fake_fleet import FakeFleet, homes
from fakes import fake_engine
from operating import Outcomes

from steploom import EngineConfig, EngineDead, EngineError, EngineNotRunning, RequestCancelled


@contextlib.asynccontextmanager
async def both_busy(names: str = "ab", workers: int = 2, **config: Any) -> AsyncIterator[Any]:
    """An engine that runs a request on each worker, whose first ticks are held; more wait."""
    config = {"data_parallel_size": workers, "max_batch": 1, "max_resident": 1, **config}
    async with fake_engine(FakeFleet, **config) as (engine, executor), anyio.create_task_group() as group:
        executor.stick(*range(workers))
        asked = Outcomes(engine, group)
        for name in names:
            await asked.ask(name)
        assert homes(executor) == {name: worker for worker, name in enumerate(names[:workers])}
        yield engine, executor, group, asked
        for worker in list(executor.stuck):
            executor.free(worker)


async def begun(call: Any, group: Any, *args: Any, **kwargs: Any) -> anyio.Event:
    """Has it begin; set when it has returned."""
    returned = anyio.Event()

    async def run() -> None:
        await call(*args, **kwargs)
        returned.set()

    group.start_soon(run)
    await anyio.wait_all_tasks_blocked()
    return returned


async def freed(executor: FakeFleet, worker: int) -> None:
    executor.free(worker)
    await anyio.wait_all_tasks_blocked()


@pytest.mark.parametrize("first", [0, 1])
async def test_a_pause_waits_for_the_ticks_of_all_workers_and_stops_all(first: int) -> None:
    async with both_busy() as (engine, executor, group, asked):
        returned = await begun(engine.pause, group)
        await freed(executor, first)
        assert not returned.is_set(), "the other one has a tick under way"
        await freed(executor, 1 - first)
        assert returned.is_set()
        ticks = len(executor.log)
        assert ticks == 2
        await asked.ask("c")
        assert len(executor.log) == ticks
        await engine.resume()
    assert asked.done == ["a", "b", "c"]


@pytest.mark.parametrize("worker", [0, 1])
async def test_who_ends_while_paused_is_forgotten_by_its_own_worker(worker: int) -> None:
    async with both_busy() as (engine, executor, group, _):
        returned = await begun(engine.pause, group)
        await engine.abort("ab"[worker])
        assert not executor.told
        for one in (0, 1):
            await freed(executor, one)
        assert returned.is_set()
        (told,) = executor.told
        (run,) = told.finished_req_ids
        assert (told.worker, run.startswith("ab"[worker])) == (worker, True)
        await engine.abort("ba"[worker])
        assert executor.told[1].worker == 1 - worker, "at once, while no tick is under way"
        await engine.resume()


@pytest.mark.parametrize("victim", [0, 1])
async def test_a_worker_that_dies_is_no_reason_to_wait_and_nobody_is_replayed_while_paused(victim: int) -> None:
    async with both_busy() as (engine, executor, group, asked):
        returned = await begun(engine.pause, group)
        await freed(executor, 1 - victim)
        executor.loading = anyio.Event()
        executor.deaths[victim].set()
        await anyio.wait_all_tasks_blocked()
        assert returned.is_set()
        assert engine.workers[victim] == "recovering"
        assert (engine.num_running, engine.num_waiting) == (1, 1)
        executor.loading.set()
        await anyio.wait_all_tasks_blocked()
        assert engine.workers == ["serves"] * 2
        assert len(executor.log) == 2
        await engine.resume()
    assert asked.done == ["a", "b"]


async def test_a_worker_that_leaves_is_no_reason_to_wait_nor_is_whom_it_held() -> None:
    async with both_busy("abc", workers=3) as (engine, executor, group, asked):
        left = await begun(engine.scale, group, 2, drain_s=1.5)
        returned = await begun(engine.pause, group)
        assert await engine.abort("c")
        for worker in (0, 1):
            await freed(executor, worker)
        assert not returned.is_set()
        with anyio.fail_after(30):
            await returned.wait()
        await left.wait()
        assert engine.workers == ["serves"] * 2
        assert all(told.worker < 2 for told in executor.told)
        await engine.resume()
    assert asked.done == ["a", "b"]


async def test_a_worker_that_is_to_end_what_it_has_does_not_leave_while_paused() -> None:
    async with both_busy() as (engine, executor, group, asked):
        left = await begun(engine.scale, group, 1)
        await begun(engine.pause, group)
        for worker in (0, 1):
            await freed(executor, worker)
        assert engine.workers == ["serves", "leaving"]
        await engine.resume()
        await left.wait()
        assert homes(executor) == {"a": 0, "b": 1}
    assert asked.done == ["a", "b"]


async def test_whom_a_worker_holds_that_leaves_while_paused_others_begin_anew_when_it_goes_on() -> None:
    async with both_busy() as (engine, executor, group, asked):
        left = await begun(engine.scale, group, 1, drain_s=0.05)
        paused = await begun(engine.pause, group)
        await freed(executor, 0)
        await freed(executor, 1)
        await left.wait()
        assert paused.is_set()
        assert (engine.num_running, engine.num_waiting) == (1, 1)
        assert len(executor.log) == 2
        await engine.resume()
    assert asked.done == ["a", "b"]


async def test_what_excludes_each_other_says_for_what_to_wait() -> None:
    async with both_busy() as (engine, executor, group, _):
        scaled = await begun(engine.scale, group, 1)
        for call in (engine.reload(), engine.sleep(), engine.scale(2)):
            with pytest.raises(EngineError, match=r"\w+\(\): scale\(\) is under way: await it first"):
                await call
        for worker in (0, 1):
            await freed(executor, worker)
        await scaled.wait()
        executor.stick(0)
        group.start_soon(engine.generate, "c")
        await anyio.wait_all_tasks_blocked()
        reloaded = await begun(engine.reload, group)
        for call in (engine.scale(2), engine.scale(1), engine.sleep()):
            with pytest.raises(EngineError, match=r"\w+\(\): reload\(\) is under way: await it first"):
                await call
        executor.free(0)
        await reloaded.wait()
        await engine.pause()
        with pytest.raises(EngineError, match=r"scale\(\): the engine is paused.*resume"):
            await engine.scale(2)
        await engine.resume()
        await engine.drain()
        await engine.scale(2)  # nothing against it
        assert engine.workers == ["serves"] * 2


async def test_a_drain_waits_for_the_requests_of_all_workers() -> None:
    async with both_busy("abcd") as (engine, executor, group, asked):
        drained = await begun(engine.drain, group)
        await freed(executor, 1)
        assert asked.done == ["b", "c", "d"]
        assert not drained.is_set()
        await freed(executor, 0)
        assert drained.is_set()
        assert await begun(engine.drain, group)
        await engine.resume()


async def test_all_who_wait_with_any_worker_are_the_new_fleets_in_order_with_their_clocks() -> None:
    async with both_busy() as (engine, old, group, asked):
        for name in "cdef":
            await asked.ask(name)
            engine._core.live.borrowed[name].accepted -= 400  # as if it had waited so long
        made: list[FakeFleet] = []

        def make(config: EngineConfig) -> FakeFleet:
            made.append(FakeFleet(config))
            made[0].stick(0, 1)
            return made[0]

        engine._make_executor = make
        reloaded = await begun(engine.reload, group)
        (new,) = made
        assert homes(new) == {"c": 0, "d": 1}
        for worker in (0, 1):
            await freed(new, worker)
        assert asked.done == ["c", "d", "e", "f"]
        assert list(homes(new)) == ["c", "d", "e", "f"]
        assert set(homes(new).values()) == {0, 1}
        assert all(400 <= asked.of[name].timings.queued_s < 500 for name in "cdef")
        assert not reloaded.is_set()
        await freed(old, 0)
        assert asked.done == ["a", "c", "d", "e", "f"]
        assert not reloaded.is_set(), "the other worker of the old fleet has not ended yet"
        await freed(old, 1)
        assert reloaded.is_set()
        assert homes(old) == {"a": 0, "b": 1}
        assert old.shut == 1
        assert engine.workers == ["serves"] * 2


@pytest.mark.parametrize("victim", [0, 1])
async def test_who_was_with_a_worker_of_the_old_fleet_that_dies_is_replayed_by_the_other(victim: int) -> None:
    async with both_busy() as (engine, old, group, asked):
        reloaded = await begun(engine.reload, group)
        old.loading = anyio.Event()
        old.deaths[victim].set()
        await freed(old, 1 - victim)
        assert asked.done == ["a", "b"]
        await reloaded.wait()
        old.free(victim)
        assert homes(old, 2) == {"ab"[victim]: 1 - victim}
        assert not engine._core.executor.log


async def test_the_new_fleet_is_as_large_as_the_old_one_was() -> None:
    async with fake_engine(FakeFleet, max_batch=1) as (engine, _):
        await engine.scale(3)
        await engine.reload()
        assert engine.workers == ["serves"] * 3
        assert engine.config.data_parallel_size == 3
        await engine.reload(data_parallel_size=2)
        assert engine.workers == ["serves"] * 2
        await engine.scale(1)
        await engine.reload()
        assert engine.workers == ["serves"]
        await engine.generate("a cat")


async def test_it_sleeps_when_all_workers_are_done() -> None:
    async with both_busy() as (engine, executor, group, _):
        asleep = await begun(engine.sleep, group)
        for worker in (1, 0):
            assert not asleep.is_set()
            await freed(executor, worker)
        assert asleep.is_set()
        with pytest.raises(EngineNotRunning, match="sleeps"):
            await engine.scale(1)
        executor.deaths[1].set()
        await anyio.wait_all_tasks_blocked()
        assert [call[2] for call in executor.rpcs] == [(1, None), (1, 1)], "its successor sleeps, too"
        await engine.wake_up()


@pytest.mark.parametrize("what", ["pause", "drain", "reload", "scale"])
async def test_closed_meanwhile_nothing_is_left(what: str) -> None:
    async with both_busy("abc") as (engine, _, group, asked):
        errors: list[Exception] = []

        async def call() -> None:
            try:
                await getattr(engine, what)(*([1] if what == "scale" else []))
            except EngineError as error:
                errors.append(error)

        group.start_soon(call)
        await anyio.wait_all_tasks_blocked()
        await engine.close()
        await anyio.wait_all_tasks_blocked()
        # What runs when the model is replaced ends with the old one; c may have been done by the new one.
        assert [type(error) for error in errors] == ([] if what == "reload" else [EngineNotRunning])
        ended = set(asked.of) - set(asked.done)
        assert ended == ({"a", "b"} if what == "reload" else {"a", "b", "c"})
        assert all(type(asked.of[name]) is RequestCancelled for name in ended)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    async with engine:
        assert (engine.paused, engine.draining) == (False, False)
        await engine.generate("a cat")


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(24))
async def test_a_scaling_that_is_cancelled_at_any_moment_leaves_no_dead_worker(moment: int) -> None:
    """A bare ``Task.cancel``, as of a loop that ends, gets through anyio's shields."""
    async with both_busy() as (engine, executor, _, asked):
        scaling = asyncio.get_running_loop().create_task(engine.scale(1, drain_s=0))
        for _ in range(moment):
            await anyio.lowlevel.checkpoint()
        scaling.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await scaling
        assert engine.workers == ["serves"] * len(executor.deaths)
        assert not any(lane.ended.is_set() for lane in engine._core.lanes)
        for worker in list(executor.stuck):
            executor.free(worker)
        for name in "ab":
            await asked.told(name)
        assert asked.done == ["a", "b"]


@pytest.mark.parametrize("kind", [EngineError, EngineDead])
async def test_a_worker_that_cannot_be_added_leaves_those_that_were(kind: type[EngineError]) -> None:
    async with fake_engine(FakeFleet) as (engine, executor):
        add = executor.add_worker

        async def with_room_for_three() -> None:
            if len(engine.workers) == 3:
                raise kind("no room")
            await add()

        executor.add_worker = with_room_for_three
        with pytest.raises(EngineError, match="no room") as caught:
            await engine.scale(5)
        assert type(caught.value) is EngineError, "the engine is not dead"
        assert engine.workers == ["serves"] * 3
        await engine.scale(2)
        await engine.generate("a cat")
