"""Workers that stand still: whoever waits for them is told, they are replaced, and no request is lost."""

from __future__ import annotations

import os
import signal
from typing import Any

import anyio
import pytest
from mortal_site import STEPS, Site, asking, expected

from steploom.errors import TickTimeout

pytestmark = pytest.mark.usefixtures("temporary")


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_call_that_is_never_answered_holds_nobody_up(site: Site, workers: int) -> None:
    async with site.engine(tick_timeout_s=0.5, call_timeout_s=0.5, data_parallel_size=workers) as engine:
        pids = await engine.collective_rpc("pid")
        os.kill(pids[0], signal.SIGSTOP)
        async with asking(engine) as asked, anyio.create_task_group() as group:

            async def call() -> None:
                with pytest.raises(TickTimeout, match=r"worker 0 did not answer pid\(\) within 0\.5 s"):
                    await engine.collective_rpc("pid")
                assert isinstance(engine.recovering, TickTimeout)

            group.start_soon(call)
            await anyio.wait_all_tasks_blocked()
            for i in range(8):
                asked.ask(f"r{i}")
        asked.all_but()
        assert len(asked.outcomes) == 8
        while engine.recovering is not None:
            await anyio.lowlevel.checkpoint()
        assert len(site.loads) == workers + 1
        assert (await engine.collective_rpc("pid"))[1:] == pids[1:]


async def test_a_reload_does_not_wait_for_it_either(site: Site) -> None:
    async with site.engine(tick_timeout_s=0.5, call_timeout_s=0.5) as engine, anyio.create_task_group() as group:
        site.kill(signal.SIGSTOP)

        async def call() -> None:
            with pytest.raises(TickTimeout):
                await engine.collective_rpc("pid")

        group.start_soon(call)
        await anyio.wait_all_tasks_blocked()
        await engine.reload()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("wakes", [False, True])
async def test_who_stands_still_is_replaced_and_sleeps_or_wakes_as_the_others(
    site: Site, wakes: bool, workers: int
) -> None:
    async with site.engine(start_timeout_s=8.0, data_parallel_size=workers) as engine:
        if wakes:
            await engine.sleep(2)
        pids = await engine.collective_rpc("pid")
        os.kill(pids[-1], signal.SIGSTOP)
        await (engine.wake_up() if wakes else engine.sleep(2))
        assert [str(fault) for fault in site.witness.faults] == [
            f"worker {workers - 1} did not answer {'wake_up' if wakes else 'sleep'}() within 8.0 s"
        ]
        assert engine.asleep is not wakes
        assert await engine.collective_rpc("asleep") == [None if wakes else 2] * workers
        assert len(site.loads) == workers + 1


@pytest.mark.slow
async def test_an_engine_whose_every_worker_stands_still_does_not_sleep(site: Site) -> None:
    async with site.engine(start_timeout_s=8.0, max_retries=1) as engine:
        with pytest.raises(TickTimeout, match=r"did not answer sleep\(\)"):
            await engine.sleep(9)
        assert not engine.asleep
        assert (await engine.generate("a", seed=1, num_inference_steps=STEPS)).output == expected("a")
        assert len(site.loads) == 3


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_worker_that_is_found_to_stand_still_is_replaced(site: Site, workers: int) -> None:
    async with site.engine(tick_timeout_s=0.5, data_parallel_size=workers) as engine:
        pids: Any = await engine.collective_rpc("pid")
        os.kill(pids[-1], signal.SIGSTOP)
        with pytest.raises(TickTimeout, match=rf"worker {workers - 1} did not answer ping\(\) within 0\.5 s"):
            await engine.check_health()
        assert isinstance(engine.recovering, TickTimeout), "whoever asks need do nothing"
        await site.witness.done.wait()
        await engine.check_health()
        assert (await engine.collective_rpc("pid"))[:-1] == pids[:-1]
        assert len(site.loads) == workers + 1
