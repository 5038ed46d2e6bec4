"""Workers that die, leave and come back at the same time as requests come and go: nothing is lost, nothing is left."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest
from anyio import to_thread
from mortal_site import Site, asking, expected
from scripted_runner import Gate

from steploom.errors import ConfigError, EngineNotRunning, GenerationFailed, RequestCancelled
from steploom.executor import DiffusionExecutor
from steploom.executor.attached import AttachedExecutor
from steploom.executor.process import WorkerProcess

pytestmark = pytest.mark.usefixtures("temporary")


@contextlib.contextmanager
def held(gate: Gate) -> Iterator[None]:
    """Whoever stands before the gate stands there to the end, though another one comes."""
    there = gate._waiting
    assert there is not None
    yield
    there.close()


async def test_an_idle_worker_that_dies_is_replaced_and_nobody_notices(site: Site, gate: Gate) -> None:
    restarted: list[str] = []
    site.witness.on_restarted = lambda request_id, attempt: restarted.append(request_id)
    async with site.engine(data_parallel_size=2, max_batch=2) as engine, asking(engine) as asked:
        workers = await engine.collective_rpc("pid")
        asked.ask("a", gate=str(gate.path), at=2)  # with the first worker
        await gate.reached()
        os.kill(workers[1], signal.SIGKILL)
        await site.witness.done.wait()
        assert engine.workers == ["serves", "serves"]
        assert (await engine.generate("b", seed=1, num_inference_steps=6)).output == expected("b"), "by the new one"
        gate.close()
    asked.all_but()
    assert restarted == []


@pytest.mark.parametrize("drain_s", [None, 0])
async def test_two_one_two_under_load_and_one_is_killed_in_between(site: Site, drain_s: float | None) -> None:
    async with site.engine(data_parallel_size=2, max_batch=3) as engine, asking(engine) as asked:
        for turn in range(6):
            for i in range(30):
                asked.ask(f"r{turn}.{i}", priority=i % 3)
            await anyio.wait_all_tasks_blocked()
            if turn % 2:
                os.kill((await engine.collective_rpc("pid"))[turn // 2 % 2], signal.SIGKILL)
            await engine.scale(1, drain_s=drain_s)
            assert len(engine.workers) == 1
            await engine.scale(2)
            while "recovering" in engine.workers:
                await anyio.lowlevel.checkpoint()
    asked.all_but()
    assert len(asked.outcomes) == 180
    assert len(site.witness.faults) >= 2, "one that leaves may be gone before anybody sees that it is dead"


async def test_who_is_cancelled_while_a_worker_is_replaced_is_not_replayed(
    site: Site, gate: Gate, tmp_path: Path
) -> None:
    loads = Gate(tmp_path / "loads")
    plan = ("ok", "ok", f"gate {loads.path}", f"gate {loads.path}")
    async with site.engine(*plan, data_parallel_size=2, max_batch=4) as engine:
        async with asking(engine) as asked:
            for i in range(8):
                asked.ask(f"r{i}", **({"gate": str(gate.path)} if i < 2 else {}))
            await gate.reached()
            with held(gate):
                await gate.reached()  # both stand still
            for worker in site.loads:
                os.kill(worker, signal.SIGKILL)
            await loads.reached()
            gate.close()
            while engine.workers != ["recovering"] * 2:
                await anyio.lowlevel.checkpoint()
            for i in range(4):
                assert await engine.abort(f"r{i}")
            assert engine.num_waiting == 4
            loads.close()
        assert all(isinstance(asked.outcomes[f"r{i}"], RequestCancelled) for i in range(4))
        asked.all_but(*(f"r{i}" for i in range(4)))
        assert len(asked.outcomes) == 8
        assert (engine.num_waiting, engine.num_running) == (0, 0)


async def test_a_worker_that_cannot_be_replaced_may_leave(site: Site, gate: Gate) -> None:
    async with site.engine("ok", "ok", f"gate {gate.path}", data_parallel_size=2) as engine:
        os.kill((await engine.collective_rpc("pid"))[1], signal.SIGKILL)
        await gate.reached()
        assert engine.workers == ["serves", "recovering"]
        with anyio.fail_after(30):
            await engine.scale(1)
        assert engine.workers == ["serves"]
        await engine.check_health()
        gate.close()
        await engine.scale(2)
        assert len(set(await engine.collective_rpc("pid"))) == 2


async def test_a_worker_that_dies_while_it_leaves_is_replaced_if_it_is_to_stay_after_all(
    site: Site, gate: Gate
) -> None:
    async with site.engine(data_parallel_size=2, max_batch=1, max_resident=1) as engine, asking(engine) as asked:
        asked.ask("a", gate=str(gate.path))
        await gate.reached()
        with held(gate):
            asked.ask("b", gate=str(gate.path))
            await gate.reached()
            async with anyio.create_task_group() as group:
                group.start_soon(engine.scale, 1)
                await anyio.wait_all_tasks_blocked()
                site.kill()
                await site.witness.begun.wait()
                group.cancel_scope.cancel()
        gate.close()
        while engine.workers not in (["serves"], ["serves", "serves"]):
            await anyio.lowlevel.checkpoint()
        await engine.scale(2)
        await engine.check_health()
    asked.all_but()
    assert len(asked.outcomes) == 2


async def test_a_call_that_fails_with_all_workers_is_told_once(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    async with site.engine(data_parallel_size=3) as engine:
        with caplog.at_level(logging.ERROR), pytest.raises(GenerationFailed, match="nonsense"):
            await engine.collective_rpc("nonsense")
        await engine.check_health()
    assert not [record for record in caplog.records if record.name == "asyncio"]


async def test_at_an_address_is_one_worker(site: Site) -> None:
    kind: type[DiffusionExecutor] = AttachedExecutor.at(site.folder / "nobody")
    with pytest.raises(ConfigError, match="data_parallel_size=2"):
        async with site.engine(data_parallel_size=2, distributed_executor_backend=kind):
            raise AssertionError("it has started")


@pytest.mark.parametrize("sooner", [True, False])
async def test_an_engine_closes_while_a_worker_is_being_started(
    site: Site, monkeypatch: pytest.MonkeyPatch, sooner: bool
) -> None:
    """Whoever asked for it is told, and no process is left, be it started before or not."""
    spawn, begun, closed = WorkerProcess.spawn, threading.Event(), threading.Event()

    def late(process: WorkerProcess) -> None:
        if sooner:
            spawn(process)
        begun.set()
        closed.wait(20)
        if not sooner:
            spawn(process)

    async with site.engine() as engine:

        async def close() -> None:
            await to_thread.run_sync(begun.wait, 20)
            await engine.close()
            closed.set()

        monkeypatch.setattr(WorkerProcess, "spawn", late)
        async with anyio.create_task_group() as group:
            group.start_soon(close)
            with pytest.raises(EngineNotRunning):
                await engine.scale(2)
    assert site.workers() == []
