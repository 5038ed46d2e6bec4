"""Workers of several ranks: whichever of them is lost, the worker is, and no request with it. No torch."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import anyio
import psutil
import pytest
from mortal_site import STEPS, Site, asking, expected
from processes import gone
from scripted_runner import Gate

from steploom import EngineDead, GenerationFailed
from steploom.errors import TickTimeout, WorkerDied

pytestmark = pytest.mark.usefixtures("temporary")


def ranks(site: Site) -> list[list[psutil.Process]]:
    """Those of each worker."""
    return [[first, *first.children()] for first in site.workers()]


@pytest.mark.parametrize("victim", [0, 1])
async def test_a_rank_is_killed_under_load_and_all_finish(site: Site, gate: Gate, victim: int) -> None:
    async with site.engine(ulysses_degree=2) as engine:
        (group,) = ranks(site)
        assert len(group) == 2
        assert await engine.collective_rpc("pid") == [group[0].pid]
        async with asking(engine) as asked:
            for i in range(16):
                asked.ask(f"r{i}", **({"gate": str(gate.path), "at": 3} if i == 0 else {}))
            await gate.reached()
            os.kill(group[victim].pid, signal.SIGKILL)
            await site.witness.begun.wait()  # although the other one stands still in the tick
            gate.close()
        asked.all_but()
        assert len(asked.outcomes) == 16
        (fault,) = site.witness.faults
        assert isinstance(fault, WorkerDied)
        assert "rank 1 died with exit code -9" in str(fault) or victim == 0
        for process in group:
            await gone(process)
        assert len(ranks(site)[0]) == 2


async def test_a_rank_that_stands_still_stops_its_worker(site: Site, tmp_path: Path) -> None:
    async with site.engine(ulysses_degree=2, tick_timeout_s=0.5) as engine, asking(engine) as asked:
        for i in range(4):
            asked.ask(f"r{i}")
        asked.ask("still", at=3, stop=str(tmp_path / "once"))
    asked.all_but()
    assert len(asked.outcomes) == 5
    assert [type(fault) for fault in site.witness.faults] == [TickTimeout]


async def test_a_rank_that_goes_another_way_ends_its_worker(site: Site, tmp_path: Path) -> None:
    async with site.engine(ulysses_degree=2) as engine, asking(engine) as asked:
        for i in range(4):
            asked.ask(f"r{i}")
        asked.ask("one", at=3, boom=str(tmp_path / "once"))
    asked.all_but()
    assert len(asked.outcomes) == 5
    assert "does not agree" in str(site.witness.faults[0])


async def test_cancelled_and_joining_ones_are_so_in_all_ranks(site: Site, gate: Gate) -> None:
    async with site.engine(ulysses_degree=3, max_batch=2, max_resident=3) as engine, asking(engine) as asked:
        asked.ask("a", gate=str(gate.path), at=2)
        await gate.reached()
        for i in range(12):
            asked.ask(f"r{i}")
        with anyio.CancelScope() as scope:
            async with engine.stream("gone", seed=1, num_inference_steps=1000) as run:
                gate.close()
                async for _ in run:
                    scope.cancel()
        while len(asked.outcomes) < 13:
            await anyio.lowlevel.checkpoint()
    asked.all_but()
    assert site.witness.faults == []


@pytest.mark.parametrize("plan", [("fail", "ok"), ("ok", "fail"), ("fail", "fail")], ids="-".join)
async def test_a_rank_that_cannot_load_fails_the_start_with_its_reason(site: Site, plan: tuple[str, ...]) -> None:
    with pytest.raises(EngineDead, match="no such weights"):
        async with site.engine(*plan, ulysses_degree=2):
            raise AssertionError("it has started")
    assert len(site.loads) <= 2, "once"


async def test_calls_are_made_in_all_ranks_and_answered_by_one(site: Site, gate: Gate) -> None:
    async with site.engine(data_parallel_size=2, ulysses_degree=2) as engine:
        groups = ranks(site)
        assert [len(group) for group in groups] == [2, 2]
        assert sorted(await engine.collective_rpc("pid")) == sorted(group[0].pid for group in groups)
        async with anyio.create_task_group() as calls:
            calls.start_soon(engine.collective_rpc, "wait", None, (str(gate.path),))
            for _ in range(4):
                await gate.reached()
                gate.open()
        with pytest.raises(GenerationFailed, match="rpc_nothing"):
            await engine.collective_rpc("nothing")
        async with asking(engine) as asked:
            for i in range(8):
                asked.ask(f"r{i}")
            await anyio.wait_all_tasks_blocked()
            os.kill(groups[1][1].pid, signal.SIGKILL)
        asked.all_but()
        await site.witness.done.wait()
        assert (await engine.generate("a", seed=1, num_inference_steps=STEPS)).output == expected("a")


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [False, sys.platform == "linux"])
async def test_the_end_of_the_engine_is_the_end_of_all_ranks(site: Site, tmp_path: Path, stopped: bool) -> None:
    site.model.write_text("")
    code = (
        "import asyncio, os, signal, sys\n"
        "from steploom import AsyncDiffusionEngine\n"
        "from mortal_site import Mortal\n"
        "async def main():\n"
        "    own = dict(distributed_executor_backend=Mortal, ulysses_degree=2, costs_file=None)\n"
        f"    async with AsyncDiffusionEngine(model={str(site.model)!r}, **own) as engine:\n"
        "        await engine.collective_rpc('ping')\n"
        "        print('up', flush=True)\n"
        "        await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = await anyio.open_process([sys.executable, "-c", code], env=environment, stderr=None)
    assert process.stdout is not None
    assert b"up" in await process.stdout.receive()
    below = psutil.Process(process.pid).children(recursive=True)
    assert len(below) == 2
    for one in below if stopped else ():
        one.suspend()
    process.kill()
    await process.wait()
    for one in below:
        await gone(one)
    await process.aclose()
