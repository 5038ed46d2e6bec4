"""A worker of the old model dies while another model is loaded: whom it held is replayed by the old model."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
from fake_fleet import FakeFleet, homes
from fakes import fake_engine
from operating import Outcomes, SlowStart

from steploom import (
    DeadlineExceeded,
    EngineDead,
    EngineError,
    EngineNotRunning,
    GenerationFailed,
    RequestCancelled,
    Restarted,
)


class Case:
    """An engine that is between two models, of which the old one has lost a worker."""

    def __init__(self, engine: Any, group: Any, asked: Outcomes) -> None:
        self.engine, self._group, self.asked = engine, group, asked
        self.core = engine._core
        self.old: FakeFleet = self.core.executor
        self.returned = anyio.Event()

    async def lose(self, worker: int = 0) -> None:
        """The worker dies; another one that takes its place begins to load."""
        self.old.loading = anyio.Event()
        self.old.deaths[worker].set()
        await anyio.wait_all_tasks_blocked()

    async def reload(self, **overrides: Any) -> None:
        """The new model serves, or is being loaded."""

        async def run() -> None:
            with contextlib.suppress(EngineNotRunning):  # it was closed
                await self.engine.reload(**overrides)
                self.returned.set()

        self._group.start_soon(run)
        await anyio.wait_all_tasks_blocked()
        assert len(self.engine._operations.cores) == 2

    async def replaced(self) -> None:
        """The worker has loaded."""
        assert self.old.loading is not None
        self.old.loading.set()
        await self.core.operations.until(lambda: self.core.lanes.fault is None)
        await anyio.wait_all_tasks_blocked()

    @property
    def new(self) -> FakeFleet:
        return self.engine._core.executor


@contextlib.asynccontextmanager
async def case(
    names: str = "abc", workers: int = 1, kind: type[FakeFleet] = FakeFleet, **config: Any
) -> AsyncIterator[Case]:
    """Each worker runs a request, in a tick that is held; the others wait."""
    config = {"data_parallel_size": workers, "max_batch": 1, "max_resident": 1, "restart_backoff_s": 0.001, **config}
    async with fake_engine(kind, **config) as (engine, old), anyio.create_task_group() as group:
        old.stick(*range(workers))
        asked = Outcomes(engine, group)
        for name in names:
            await asked.ask(name)
        yield Case(engine, group, asked)
        for worker in list(old.stuck):
            old.free(worker)


@pytest.mark.parametrize("workers", [1, 2])
async def test_whom_it_held_the_old_model_replays_and_the_new_one_has_those_that_never_ran(workers: int) -> None:
    async with case("abcd", workers) as at:
        await at.lose()
        await at.reload()
        assert at.asked.done == list("abcd"[workers:])
        assert sorted(homes(at.new)) == list("abcd"[workers:])
        since = len(at.old.log)
        at.old.free(0)
        await at.replaced()
        assert homes(at.old, since) == {"a": 0}
        assert "a" in at.asked.done
        if workers > 1:
            at.old.free(1)
        await at.returned.wait()
        assert at.old.shut == 1
    assert at.asked.done == list("abcd")


async def test_one_of_several_workers_is_lost_and_another_old_one_replays_whom_it_held() -> None:
    async with case("abc", workers=2) as at:
        await at.lose()
        await at.reload()
        assert at.asked.done == ["c"]
        since = len(at.old.log)
        at.old.free(1)
        await at.returned.wait()
        assert homes(at.old, since) == {"a": 1}, "while the first one loads, which is not waited for"
    assert at.asked.done == ["a", "b", "c"]


async def unread(run: Any) -> AsyncIterator[Any]:
    while len(run._mailbox):
        yield await anext(run)


async def test_attempts_are_counted_on_and_so_are_deaths() -> None:
    async with case("", max_retries=2) as at:
        async with at.engine.stream("a") as run:
            await anyio.wait_all_tasks_blocked()
            for attempt in (1, 2):
                await at.lose()
                assert [event.attempt async for event in unread(run) if isinstance(event, Restarted)] == [attempt]
                if attempt == 1:
                    await at.reload()
                await at.replaced()
            await at.lose()
            with pytest.raises(GenerationFailed, match=r"gave up after 3 attempts.*max_retries=2"):
                await run.result()
        await at.returned.wait()
        await at.engine.generate("new")


async def test_who_waits_for_the_old_model_may_be_too_late_and_aborted_and_then_it_ends() -> None:
    async with case("b", workers=2) as at:
        await at.asked.ask("a", timeout=1000)
        await at.lose(0)
        await at.lose(1)
        await at.reload()
        assert (at.engine.num_waiting, at.asked.of) == (2, {})
        at.core._expire(at.core.live.borrowed["a"].request)
        await anyio.wait_all_tasks_blocked()
        assert isinstance(at.asked.of["a"], DeadlineExceeded)
        assert not at.returned.is_set()
        assert await at.engine.abort("b")
        await at.returned.wait()
        assert isinstance(at.asked.of["b"], RequestCancelled)
        assert at.old.shut == 1, "though its workers had not been replaced"
        assert at.engine._operations.cores == [at.engine._core]
        at.old.stuck.clear()


@pytest.mark.parametrize("how", ["drain", "pause"])
async def test_what_is_asked_of_the_engine_meanwhile_is_for_those_too(how: str) -> None:
    async with case() as at, anyio.create_task_group() as group:
        await at.lose()
        await at.reload()
        group.start_soon(getattr(at.engine, how))
        await anyio.wait_all_tasks_blocked()
        at.old.free(0)
        await at.replaced()
        assert at.asked.done == (["a", "b", "c"] if how == "drain" else ["b", "c"])
        assert at.returned.is_set() == (how == "drain")
        await at.engine.resume()
        await at.returned.wait()
    assert at.asked.done == ["a", "b", "c"]


@pytest.mark.parametrize("loading", [True, False])
async def test_closed_meanwhile_nothing_is_left(loading: bool) -> None:
    async with case(workers=2) as at:
        await at.lose(0)
        await at.lose(1)
        await at.reload(**{"distributed_executor_backend": SlowStart, "data_parallel_size": 1} if loading else {})
        cores = list(at.engine._operations.cores)
        await at.engine.close()
        assert [core.executor.shut for core in cores] == [1, 1]
        at.old.stuck.clear()
    assert {name for name, what in at.asked.of.items() if isinstance(what, RequestCancelled)} >= {"a", "b"}
    assert len(at.asked.of) == 3


async def test_whom_a_worker_held_that_has_left_stays_with_the_old_model_too() -> None:
    async with case("abc", workers=2) as at:
        await at.engine.scale(1, drain_s=0)
        assert at.engine.num_waiting == 2
        at.old.stuck.pop(1)
        await at.reload()
        assert at.asked.done == ["c"]
        since = len(at.old.log)
        at.old.free(0)
        await at.returned.wait()
        assert homes(at.old, since) == {"b": 0}
    assert at.asked.done == ["a", "b", "c"]


class NeverAgain(FakeFleet):
    """Its workers are not replaced."""

    async def recover(self, worker: int = 0) -> None:
        await self._load()
        raise EngineDead("no such weights")


async def test_an_old_model_that_cannot_be_loaded_again_fails_whom_it_held_and_not_the_engine() -> None:
    async with case(kind=NeverAgain, max_retries=1) as at:
        await at.lose()
        await at.reload()
        assert at.old.loading is not None
        at.old.loading.set()
        told = await at.asked.told("a")
        assert "could not be started again, tried 2 times (max_retries=1): no such weights" in str(told)
        assert type(told) is EngineError, "EngineDead would say that this engine is"
        await at.returned.wait()
        assert at.asked.done == ["b", "c"]
        await at.engine.generate("new")
        at.old.stuck.clear()
