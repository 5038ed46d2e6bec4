"""Workers of several ranks that lose one at odd times: while they load, in a call, asleep, paused. No torch."""

from __future__ import annotations

import os
import signal
from contextlib import suppress

import anyio
import psutil
import pytest
from mortal_site import Site, asking
from processes import gone
from scripted_runner import Gate

from steploom.errors import TickTimeout, WorkerDied

pytestmark = [pytest.mark.usefixtures("temporary"), pytest.mark.slow]
VICTIMS = pytest.mark.parametrize("victim", [0, 1])


def ranks(site: Site) -> list[psutil.Process]:
    """Those of the only worker."""
    (first,) = site.workers()
    return [first, *first.children()]


async def lose(group: list[psutil.Process], victim: int) -> None:
    """Kills one; returns when all are gone."""
    os.kill(group[victim].pid, signal.SIGKILL)
    for process in group:
        await gone(process)


@VICTIMS
async def test_while_they_load_the_start_fails_and_nothing_is_left(site: Site, gate: Gate, victim: int) -> None:
    async def start() -> None:
        # that of rank 0 is this process's child, for whose exit code psutil may have asked first
        with pytest.raises(WorkerDied, match="rank 1 died with exit code -9" if victim else "worker 0 died"):
            async with site.engine(*[f"gate {gate.path}"] * 2, ulysses_degree=2):
                raise AssertionError("it has started")

    async with anyio.create_task_group() as group:
        group.start_soon(start)
        await gate.reached()
        await lose(ranks(site), victim)
        gate.close()


@VICTIMS
async def test_while_they_load_again_it_is_tried_once_more(site: Site, gate: Gate, victim: int) -> None:
    plan = ["ok", "ok", *[f"gate {gate.path}"] * 2]
    async with site.engine(*plan, ulysses_degree=2) as engine, asking(engine) as asked:
        for i in range(8):
            asked.ask(f"r{i}")
        await lose(ranks(site), victim)
        await gate.reached()
        await lose(ranks(site), victim)
        gate.close()
    asked.all_but()
    assert len(asked.outcomes) == 8


@VICTIMS
async def test_in_a_call_it_fails_alone(site: Site, gate: Gate, victim: int) -> None:
    async with site.engine(ulysses_degree=2) as engine:
        async with anyio.create_task_group() as group:

            async def call() -> None:
                with pytest.raises(WorkerDied):
                    await engine.collective_rpc("wait", None, (str(gate.path),))

            group.start_soon(call)
            await gate.reached()
            await lose(ranks(site), victim)
        await site.witness.done.wait()
        async with asking(engine) as asked:
            asked.ask("after")
        asked.all_but()


@VICTIMS
async def test_asleep_its_successor_sleeps_on(site: Site, victim: int) -> None:
    async with site.engine(ulysses_degree=2) as engine:
        await engine.sleep()
        await lose(ranks(site), victim)
        await site.witness.done.wait()
        assert (engine.asleep, await engine.collective_rpc("asleep")) == (True, [1])
        await engine.wake_up()
        async with asking(engine) as asked:
            asked.ask("after")
        asked.all_but()


@VICTIMS
async def test_paused_twice_all_are_replayed(site: Site, gate: Gate, victim: int) -> None:
    async with site.engine(ulysses_degree=2) as engine, asking(engine) as asked:
        asked.ask("held", gate=str(gate.path), at=2)
        for i in range(8):
            asked.ask(f"r{i}")
        await gate.reached()
        async with anyio.create_task_group() as group:
            group.start_soon(engine.pause)
            await anyio.wait_all_tasks_blocked()
            gate.close()
        await lose(ranks(site), victim)
        await site.witness.done.wait()
        await lose(ranks(site), victim)
        await engine.resume()
    asked.all_but()
    assert len(asked.outcomes) == 9


@pytest.mark.parametrize("what", ["check_health", "a long call"])
async def test_one_that_stands_still_is_found_by_calls(site: Site, what: str) -> None:
    async with site.engine(ulysses_degree=2, tick_timeout_s=0.5, call_timeout_s=0.5) as engine:
        group = ranks(site)
        os.kill(group[1].pid, signal.SIGSTOP)
        with suppress(TickTimeout):
            if what == "check_health":
                await engine.check_health()
            else:  # more than there is room for between two ranks
                await engine.collective_rpc("ping", args=([1.5] * 100_000,))
            raise AssertionError("it has answered")
        for process in group:
            await gone(process)
        await site.witness.done.wait()
        async with asking(engine) as asked:
            asked.ask("after")
        asked.all_but()
