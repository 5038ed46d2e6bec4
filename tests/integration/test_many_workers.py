"""Several worker processes behind one queue: killed, added and removed under load, and no request is lost."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest
from exposition import local
from mortal_site import STEPS, Site, asking, expected
from processes import content, gone
from prometheus_client import CollectorRegistry
from scripted_runner import Gate

from steploom import EngineConfig, EngineDead
from steploom.errors import ConfigError, EngineError, EngineNotRunning, InvalidRequest, TickTimeout, WorkerDied
from steploom.protocol import RunnerOutput, SchedulerOutput
from steploom.sched import Fcfs, SchedulerInterface
from steploom.server import create_app
from steploom.telemetry import EngineMetrics

pytestmark = pytest.mark.usefixtures("temporary")


class Ticks:
    """Which workers had ticks, and with how many requests."""

    def __init__(self, site: Site) -> None:
        self.most: dict[int, int] = {}
        self.homes: dict[str, set[int]] = {}
        site.witness.on_tick = self.on_tick

    def on_tick(self, output: SchedulerOutput, result: RunnerOutput, began: float, ended: float) -> None:
        self.most[output.worker] = max(self.most.get(output.worker, 0), len(output.run_ids))
        for run in output.run_ids:
            self.homes.setdefault(run, set()).add(output.worker)


async def test_requests_live_where_they_were_admitted_and_all_workers_have_some(site: Site) -> None:
    ticks = Ticks(site)
    async with site.engine(data_parallel_size=2, max_batch=4) as engine:
        assert engine.workers == ["serves", "serves"]
        assert len(set(await engine.collective_rpc("pid"))) == 2
        second = (await engine.collective_rpc("pid"))[1]
        assert await engine.collective_rpc("pid", unique_reply_rank=1) == second
        with pytest.raises(InvalidRequest, match="2 workers"):
            await engine.collective_rpc("pid", unique_reply_rank=2)
        async with asking(engine) as asked:
            for i in range(40):
                asked.ask(f"r{i}")
    asked.all_but()
    assert len(asked.outcomes) == 40
    assert ticks.most == {0: 4, 1: 4}
    assert all(len(homes) == 1 for homes in ticks.homes.values())


@pytest.mark.parametrize("victim", [0, 1])
async def test_one_of_two_is_killed_under_load_and_the_other_replays_at_once(
    site: Site, gate: Gate, tmp_path: Path, victim: int
) -> None:
    other = Gate(tmp_path / "loads")
    ticks = Ticks(site)
    async with site.engine("ok", "ok", f"gate {other.path}", data_parallel_size=2) as engine:
        workers = await engine.collective_rpc("pid")
        async with asking(engine) as asked:
            async with anyio.create_task_group() as started:
                for i in range(2):
                    started.start_soon(engine.generate, f"s{i}")
            ticks.most.clear()
            for i in range(16):
                asked.ask(f"r{i}", **({"gate": str(gate.path), "at": 3} if i < 2 else {}))
            await gate.reached()
            os.kill(workers[victim], signal.SIGKILL)
            await other.reached()
            gate.close()
            assert sorted(engine.workers) == ["recovering", "serves"]
            assert engine.workers[victim] == "recovering"
            assert isinstance(engine.recovering, WorkerDied)
            while len(asked.outcomes) < 16:
                await anyio.lowlevel.checkpoint()
            asked.all_but()
            with pytest.raises(EngineError, match="is being replaced"):
                await engine.check_health()
            async with local(create_app(engine)) as client:
                answers = [await client.get(path) for path in ("/ready", "/health")]
                assert [answer.status_code for answer in answers] == [200, 200]
                assert answers[1].json()["status"] == "recovering"
            other.close()
            await site.witness.done.wait()
        assert engine.workers == ["serves", "serves"]
        now = await engine.collective_rpc("pid")
        assert now[victim] not in workers
        assert now[1 - victim] == workers[1 - victim]
        await engine.check_health()
    assert len(site.loads) == 3


async def test_a_worker_that_stands_still_is_replaced_and_others_go_on(site: Site, tmp_path: Path) -> None:
    async with site.engine(data_parallel_size=2, tick_timeout_s=0.3) as engine:
        async with asking(engine) as asked:
            for i in range(12):
                asked.ask(f"r{i}")
            asked.ask("bad", at=3, stop=str(tmp_path / "once"))
        asked.all_but()
        assert len(asked.outcomes) == 13
        assert [type(fault) for fault in site.witness.faults] == [TickTimeout]


async def test_the_one_that_kills_workers_fails_alone(site: Site) -> None:
    async with site.engine(data_parallel_size=2) as engine:
        async with asking(engine) as asked:
            for i in range(15):
                asked.ask(f"r{i}")
            asked.ask("killer", kill=True, at=3)
        asked.all_but("killer")
        assert len(asked.outcomes) == 16
        assert "exit code -9" in str(asked.outcomes["killer"])


async def test_workers_come_and_go_under_load(site: Site, temporary: Path) -> None:
    ticks = Ticks(site)
    async with site.engine(max_batch=2) as engine, asking(engine) as asked:
        (folder,) = content(temporary)
        files = psutil.Process().num_fds()
        for i in range(60):
            asked.ask(f"r{i}")
        await engine.scale(3)
        assert engine.workers == ["serves"] * 3
        workers = await engine.collective_rpc("pid")
        for i in range(60, 200):
            asked.ask(f"r{i}")
        while set(ticks.most) != {0, 1, 2}:
            await anyio.lowlevel.checkpoint()
        await engine.scale(2)
        assert await engine.collective_rpc("pid") == workers[:2]
        assert not psutil.pid_exists(workers[2])
        await engine.scale(1, drain_s=0)
        assert engine.workers == ["serves"]
        while psutil.Process().num_fds() > files:  # a thread of ZeroMQ closes them
            await anyio.lowlevel.checkpoint()
        assert len(content(folder)) == 1
    asked.all_but()
    assert len(asked.outcomes) == 200


@pytest.mark.slow
async def test_who_leaves_ends_what_it_has_within_its_time(site: Site, gate: Gate) -> None:
    restarted: list[tuple[str, int]] = []
    site.witness.on_restarted = lambda *what: restarted.append(what)
    async with site.engine(data_parallel_size=2, max_batch=1, max_resident=1) as engine, asking(engine) as asked:
        asked.ask("short", gate=str(gate.path))  # with the first worker
        await gate.reached()
        asked.ask("long", gate=str(gate.path))  # with the second one, which leaves
        held = gate._waiting
        await gate.reached()
        async with anyio.create_task_group() as group:
            group.start_soon(engine.scale, 1)
            await anyio.wait_all_tasks_blocked()
            assert engine.workers == ["serves", "leaving"]
            with pytest.raises(EngineError, match="under way"):
                await engine.scale(3)
            group.cancel_scope.cancel()
        assert engine.workers == ["serves", "serves"]
        await engine.scale(1, drain_s=0.01)
        assert engine.workers == ["serves"]
        assert held is not None
        held.close()
        gate.close()
    assert asked.outcomes == {"short": expected("short"), "long": expected("long")}
    assert restarted == [("long", 1)]


async def test_a_worker_that_dies_while_it_leaves_has_left(site: Site, gate: Gate) -> None:
    async with site.engine(data_parallel_size=2, max_batch=1, max_resident=1) as engine, asking(engine) as asked:
        workers, held = await engine.collective_rpc("pid"), []
        for name in ("a", "b"):
            asked.ask(name, gate=str(gate.path))
            await gate.reached()
            held.append(gate._waiting)
        async with anyio.create_task_group() as group:
            group.start_soon(engine.scale, 1)
            await anyio.wait_all_tasks_blocked()
            os.kill(workers[1], signal.SIGKILL)
        assert engine.workers == ["serves"]
        os.kill(workers[0], signal.SIGKILL)
        held[0].close()
        gate.close()
    asked.all_but()
    assert len(asked.outcomes) == 2
    assert len(site.loads) == 3


async def test_a_worker_that_cannot_be_added_leaves_nothing_behind(site: Site, gate: Gate) -> None:
    async with site.engine("ok", "fail", f"gate {gate.path}", "other") as engine:
        (first,) = await engine.collective_rpc("pid")
        with pytest.raises(EngineError, match="no such weights"):
            await engine.scale(2)
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:

                async def cancel() -> None:
                    await gate.reached()
                    scope.cancel()

                group.start_soon(cancel)
                await engine.scale(2)
        with pytest.raises(EngineError, match="another one than at the start"):
            await engine.scale(2)
        assert engine.workers == ["serves"]
        assert [child.pid for child in site.workers()] == [first]
        await engine.scale(2)
        assert engine.workers == ["serves"] * 2
        for workers in (0, 1.5, True, "2"):
            with pytest.raises(ConfigError, match="workers="):
                await engine.scale(workers)
        with pytest.raises(ConfigError, match="drain_s=-1"):
            await engine.scale(1, drain_s=-1)
        await engine.sleep(2)
        with pytest.raises(EngineNotRunning, match="sleeps"):
            await engine.scale(1)


async def test_a_worker_that_cannot_be_replaced_is_tried_on_while_another_serves(site: Site) -> None:
    async with site.engine("ok", "ok", *["fail"] * 5, data_parallel_size=2) as engine:
        workers = await engine.collective_rpc("pid")
        os.kill(workers[1], signal.SIGKILL)
        await site.witness.done.wait()
        assert engine.workers == ["serves", "serves"]
        assert len(site.loads) == 8
        assert (await engine.collective_rpc("pid"))[0] == workers[0]


async def test_the_engine_dies_when_no_worker_can_be_replaced(site: Site) -> None:
    async with site.engine("ok", "ok", *["fail"] * 50, data_parallel_size=2, restart_backoff_s=0.001) as engine:
        for worker in await engine.collective_rpc("pid"):
            os.kill(worker, signal.SIGKILL)
        with anyio.fail_after(60):
            assert "could not be started again" in str(await engine.wait_ended())


async def test_a_worker_that_slept_sleeps_again_though_another_is_lost_too(site: Site) -> None:
    async with site.engine(data_parallel_size=2) as engine:
        await engine.sleep(2)
        for worker in await engine.collective_rpc("pid"):
            os.kill(worker, signal.SIGKILL)
        while site.witness.recovered < 2:
            await anyio.lowlevel.checkpoint()
        assert await engine.collective_rpc("asleep") == [2, 2]
        await engine.wake_up()
        assert (await engine.generate("a", seed=1, num_inference_steps=STEPS)).output == expected("a")


async def test_closing_ends_all_of_them(site: Site) -> None:
    async with site.engine(data_parallel_size=3) as engine:
        workers = [psutil.Process(pid) for pid in await engine.collective_rpc("pid")]
    for worker in workers:
        await gone(worker)


async def test_a_start_fails_if_one_of_them_cannot_load(site: Site, gate: Gate) -> None:
    with anyio.fail_after(30), pytest.raises(EngineDead, match="no such weights"):
        async with site.engine("fail", f"gate {gate.path}", data_parallel_size=2):
            raise AssertionError("it has started")


async def test_metrics_say_what_workers_do(site: Site) -> None:
    registry = CollectorRegistry()
    async with site.engine(data_parallel_size=2) as engine:
        EngineMetrics(engine, registry)
        states = {
            state: registry.get_sample_value("steploom_workers", {"state": state})
            for state in ("serves", "recovering", "leaving")
        }
        assert states == {"serves": 2, "recovering": 0, "leaving": 0}


class Own(SchedulerInterface):
    def __init__(self, config: EngineConfig, policy: Fcfs, clock: Any) -> None:
        pass

    add_request = schedule = update_from_output = finish_requests = restart = lambda self, *args: None
    has_work = num_waiting = num_running = 0


async def test_a_scheduler_that_cannot_share_is_refused_before_anything_starts(site: Site) -> None:
    with pytest.raises(ConfigError, match="BaseScheduler"):
        async with site.engine(data_parallel_size=2, scheduler=Own):
            raise AssertionError("it has started")
    assert sorted(path.name for path in site.folder.iterdir()) == ["model"], "nothing was loaded"
