"""Pause, drain and another model over two real workers: one of them is killed meanwhile, or everything is closed."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest
from exposition import local
from mortal_site import Site, asking
from scripted_runner import Gate

from steploom import RequestCancelled
from steploom.server import create_app

pytestmark = pytest.mark.usefixtures("temporary")


@contextlib.asynccontextmanager
async def running(site: Site, gate: Gate, *plan: str, **config: Any) -> AsyncIterator[Any]:
    """An engine of two workers, each of which stands still in the third step of one of its requests."""
    config = {"data_parallel_size": 2, "max_batch": 2, "max_resident": 2, **config}
    async with site.engine(*plan, **config) as engine, asking(engine) as asked:
        workers, held = await engine.collective_rpc("pid"), []
        for i in range(2):
            asked.ask(f"g{i}", gate=str(gate.path), at=3)
            await gate.reached()
            held.append(gate._waiting)
        for i in range(6):
            asked.ask(f"r{i}")
        await anyio.wait_all_tasks_blocked()

        def let_go() -> None:
            for one in held:
                one.close()
            gate.close()

        yield engine, asked, workers, let_go


def other(site: Site) -> str:
    """Another model."""
    path = site.folder / "other"
    path.write_text("other\n" * 4)
    return str(path)


async def has(engine: Any, pipeline: str) -> None:
    while engine.info.pipeline_class != pipeline:
        await anyio.lowlevel.checkpoint()


@pytest.mark.parametrize("victim", [0, 1])
async def test_one_of_two_is_killed_while_paused(site: Site, gate: Gate, tmp_path: Path, victim: int) -> None:
    loads = Gate(tmp_path / "loads")
    async with (
        running(site, gate, "ok", "ok", f"gate {loads.path}") as (engine, asked, workers, let_go),
        anyio.create_task_group() as group,
    ):
        group.start_soon(engine.pause)
        await anyio.wait_all_tasks_blocked()
        let_go()
        while not engine._operations._paused:
            await anyio.lowlevel.checkpoint()
        held = await engine.collective_rpc("held")
        assert all(held)
        os.kill(workers[victim], signal.SIGKILL)
        await loads.reached()
        async with local(create_app(engine)) as client:
            ready, health = [await client.get(path) for path in ("/ready", "/health")]
        assert (ready.status_code, ready.json()["why"]) == (503, "paused")
        assert (health.status_code, health.json()["status"]) == (200, "recovering")
        loads.close()
        await site.witness.done.wait()
        now = await engine.collective_rpc("held")
        assert now[victim] == {}, "nothing is replayed before it goes on"
        assert now[1 - victim] == held[1 - victim], "nor has the other one moved"
        await engine.resume()
    asked.all_but()
    assert len(asked.outcomes) == 8


async def test_a_drain_outlasts_the_death_of_one_of_two(site: Site, gate: Gate) -> None:
    async with running(site, gate) as (engine, asked, workers, let_go):
        ended: list[int] = []

        async def drain() -> None:
            ended.append(await engine.drain(60))

        async with anyio.create_task_group() as group:
            group.start_soon(drain)
            await anyio.wait_all_tasks_blocked()
            os.kill(workers[1], signal.SIGKILL)
            await site.witness.begun.wait()
            let_go()
        assert ended == [0]
    asked.all_but()
    assert len(asked.outcomes) == 8


@pytest.mark.parametrize("scaled", [False, True])
async def test_one_of_the_old_two_is_killed_once_the_new_two_are_there(site: Site, gate: Gate, scaled: bool) -> None:
    async with running(site, gate) as (engine, asked, workers, let_go), anyio.create_task_group() as group:
        if scaled:
            await engine.scale(3)
        group.start_soon(lambda: engine.reload(model=other(site)))
        await has(engine, "Other")
        new = await engine.collective_rpc("pid")
        assert len(new) == 2 + scaled
        assert not set(new) & set(site.loads)
        os.kill(workers[0], signal.SIGKILL)
        await site.witness.begun.wait()
        let_go()
        await engine.generate("new", seed=1)
    asked.all_but()
    assert len(asked.outcomes) == 8
    assert not any(psutil.pid_exists(pid) for pid in site.loads)


@pytest.mark.parametrize("what", ["pause", "drain", "reload"])
async def test_closed_meanwhile_no_process_is_left(site: Site, gate: Gate, what: str) -> None:
    async with running(site, gate) as (engine, asked, _, let_go), anyio.create_task_group() as group:

        async def call() -> None:
            with contextlib.suppress(Exception):
                await (engine.reload(model=other(site)) if what == "reload" else getattr(engine, what)())

        group.start_soon(call)
        await anyio.wait_all_tasks_blocked()
        if what == "reload":
            await has(engine, "Other")
            assert len(site.workers()) == 4
        async with anyio.create_task_group() as closing:
            closing.start_soon(engine.close)
            let_go()
    assert all(isinstance(asked.outcomes[f"g{i}"], RequestCancelled) for i in range(2))
    assert len(asked.outcomes) == 8


@pytest.mark.parametrize("leaves", [False, True])
@pytest.mark.parametrize("wakes", [False, True])
async def test_one_of_two_is_killed_while_it_falls_asleep_or_wakes(site: Site, wakes: bool, leaves: bool) -> None:
    """The other one has done so by then; and the caller may have left."""
    async with site.engine(data_parallel_size=2) as engine:
        if wakes:
            await engine.sleep(2)
        workers = await engine.collective_rpc("pid")
        kill = partial(os.kill, workers[1], signal.SIGKILL)
        os.kill(workers[1], signal.SIGSTOP)
        async with anyio.create_task_group() as group:
            group.start_soon(engine.wake_up if wakes else partial(engine.sleep, 2))
            await anyio.wait_all_tasks_blocked()
            while engine._core.executor._channels[0]._calls:
                await anyio.lowlevel.checkpoint()
            (group.cancel_scope.cancel if leaves else kill)()
        if leaves:
            kill()
        await site.witness.done.wait()
        while engine._operations.slept != (None if wakes else 2):
            await anyio.lowlevel.checkpoint()
        if not wakes:
            assert engine.asleep
            assert await engine.collective_rpc("asleep") == [2, 2]
            await engine.wake_up()
        assert await engine.collective_rpc("asleep") == [None, None]
        await engine.generate("a", seed=1)
