"""Workers that are killed, stopped, or talk nonsense: others take their place, and no request is lost."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest
from exposition import local
from mortal_site import STEPS, Site, asking, expected, recovering
from processes import content, gone
from prometheus_client import CollectorRegistry
from scripted_runner import Gate

from steploom import EngineDead, GenerationFailed
from steploom.errors import (
    DeadlineExceeded,
    EngineError,
    EngineNotRunning,
    ProtocolError,
    RequestCancelled,
    TickTimeout,
    WorkerDied,
)
from steploom.requests import Event, Restarted, StepEvent
from steploom.server import create_app
from steploom.telemetry import EngineMetrics

pytestmark = pytest.mark.usefixtures("temporary")


async def test_sixteen_run_while_the_only_worker_is_killed(site: Site, gate: Gate, caplog: Any) -> None:
    events: list[Event] = []
    with caplog.at_level(logging.WARNING, "steploom.engine"):
        async with site.engine() as engine:
            before = engine.info
            async with asking(engine) as asked:
                for i in range(15):
                    asked.ask(f"r{i}")
                async with engine.stream("r15", seed=1, num_inference_steps=STEPS, gate=str(gate.path), at=3) as run:
                    await gate.reached()
                    assert engine.num_running == 16
                    site.kill()
                    gate.close()
                    async for event in run:
                        events.append(event)
                    asked.outcomes["r15"] = (await run.result()).output
            asked.all_but()
            assert len(asked.outcomes) == 16
            assert engine.info is before
            await engine.check_health()
    assert len(site.loads) == 2, "one load, and one replay"
    assert [type(fault) for fault in site.witness.faults] == [WorkerDied]
    assert "worker 0 died with exit code -9" in caplog.text
    steps = [event.step for event in events if isinstance(event, StepEvent)]
    again = next(i for i, event in enumerate(events) if isinstance(event, Restarted))
    after = [event.step for event in events[again:] if isinstance(event, StepEvent)]
    assert after == sorted(after)
    assert after[-1] == STEPS == max(steps)


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        ("stop", TickTimeout, "did not answer tick"),
        ("corrupt", ProtocolError, "a message cannot be decoded"),
        ("wrong", ProtocolError, "answers another tick"),
        ("boom", EngineDead, "RuntimeError: the runner is broken"),
        ("empty", ProtocolError, "with neither an output nor an error"),
        ("both", ProtocolError, "or with both"),
        ("settings", EngineDead, "odd settings"),
        ("fatal", EngineDead, "odd settings"),
    ],
)
async def test_whatever_is_wrong_with_a_worker_it_is_replaced(
    site: Site, tmp_path: Path, fault: str, kind: type[EngineError], words: str
) -> None:
    # Who hears nothing is killed, and not asked first.
    async with site.engine(tick_timeout_s=0.3, kill_timeout_s=1000.0) as engine:
        async with asking(engine) as asked:
            for i in range(4):
                asked.ask(f"r{i}")
            asked.ask("bad", at=3, **{fault: str(tmp_path / "once")})
        asked.all_but()
        assert len(asked.outcomes) == 5
        (error,) = site.witness.faults
        assert isinstance(error, kind)
        assert words in str(error)
        first, second = site.loads
        await gone_by_id(first)
        assert (await engine.collective_rpc("pid")) == [second]


async def gone_by_id(process: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        await gone(psutil.Process(process))


async def test_the_one_that_kills_its_worker_each_time_fails_alone(site: Site) -> None:
    async with site.engine() as engine:
        async with asking(engine) as asked:
            for i in range(7):
                asked.ask(f"r{i}")
            asked.ask("killer", kill=True, at=3)
        asked.all_but("killer")
        assert len(asked.outcomes) == 8
        error = asked.outcomes["killer"]
        assert isinstance(error, GenerationFailed)
        assert "worker 0 died with exit code -9" in str(error)
        assert "max_retries=2" in str(error)
        assert len(site.loads) <= 1 + 3 + 3
        assert (await engine.generate("later", seed=1, num_inference_steps=STEPS)).output == expected("later")


async def test_without_retries_who_ran_fails_and_others_are_served(site: Site, gate: Gate) -> None:
    async with site.engine(max_retries=0, max_batch=1, max_resident=1) as engine:
        async with asking(engine) as asked:
            asked.ask("runs", gate=str(gate.path))
            await gate.reached()
            asked.ask("waits")
            site.kill()
        asked.all_but("runs")
        assert isinstance(asked.outcomes["runs"], GenerationFailed)
        assert "waits" in asked.outcomes


async def test_an_idle_worker_that_dies_is_replaced_before_anybody_asks(site: Site) -> None:
    async with site.engine() as engine:
        for _ in range(3):
            site.witness.done = anyio.Event()
            site.kill()
            await site.witness.done.wait()
            assert engine.recovering is None
        assert (await engine.generate("next", seed=1, num_inference_steps=STEPS)).output == expected("next")
        assert len(site.loads) == 4


async def test_a_replacement_that_dies_while_it_loads_is_replaced(site: Site, gate: Gate) -> None:
    async with site.engine("ok", "die", "fail") as engine:
        async with asking(engine) as asked:
            asked.ask("a", gate=str(gate.path))
            await gate.reached()
            gate.close()
            site.kill()
        asked.all_but()
        assert len(site.loads) == 4
        assert site.witness.recovered == 1


@pytest.mark.parametrize("word", ["fail", "die", "other"])
async def test_an_engine_whose_worker_cannot_be_replaced_dies_of_it(site: Site, gate: Gate, word: str) -> None:
    reasons = {"fail": "no such weights", "die": "died with exit code -9", "other": "another one than at the start"}
    async with site.engine("ok", word, word, word, "ok") as engine:
        async with asking(engine) as asked:
            asked.ask("a", gate=str(gate.path))
            await gate.reached()
            site.kill()
        error = asked.outcomes["a"]
        assert isinstance(error, EngineDead)
        assert reasons[word] in str(error)
        assert "tried 3 times (max_retries=2)" in str(error)
        with pytest.raises(EngineDead, match="died of"):
            await engine.generate("b")
        assert len(site.loads) == 4


async def test_a_model_that_cannot_load_fails_the_start_once(site: Site) -> None:
    with pytest.raises(EngineDead, match="no such weights"):
        async with site.engine("fail"):
            raise AssertionError("it has started")
    assert len(site.loads) == 1


async def test_requests_are_taken_while_the_worker_is_replaced(site: Site, gate: Gate) -> None:
    async with recovering(site, gate) as (engine, asked):
        assert isinstance(engine.recovering, WorkerDied)
        assert engine.serves
        asked.ask("b")
        await anyio.wait_all_tasks_blocked()
        assert (engine.num_waiting, engine.num_running) == (2, 0)
        for call in (engine.check_health, lambda: engine.collective_rpc("ping"), engine.wake_up):
            with pytest.raises(EngineError, match=r"is being replaced.*worker 0 died with exit code -9"):
                await call()
    asked.all_but()
    assert set(asked.outcomes) == {"a", "b"}
    assert engine.recovering is None


async def test_requests_end_early_while_the_worker_is_replaced(site: Site, gate: Gate) -> None:
    async with recovering(site, gate) as (engine, asked):
        assert await engine.abort("a")
        asked.ask("late", timeout=0.01)
        async with engine.stream("left"):
            pass
        while len(asked.outcomes) < 2:
            await anyio.lowlevel.checkpoint()
        assert engine.num_waiting == 0
    assert isinstance(asked.outcomes["a"], RequestCancelled)
    assert isinstance(asked.outcomes["late"], DeadlineExceeded)


async def test_closing_does_not_wait_for_the_replacement(site: Site, gate: Gate) -> None:
    async with recovering(site, gate) as (engine, asked):
        with anyio.fail_after(30):
            await engine.close()
    assert isinstance(asked.outcomes["a"], RequestCancelled)
    with pytest.raises(EngineNotRunning):
        engine.check_serving()


async def test_closing_does_not_wait_for_the_backoff(site: Site) -> None:
    async with site.engine("ok", "fail", restart_backoff_s=60.0) as engine:
        site.kill()
        await site.witness.begun.wait()
        while len(site.loads) < 2:
            await anyio.lowlevel.checkpoint()
        with anyio.fail_after(30):
            await engine.close()
    assert len(site.loads) == 2


async def test_calls_that_wait_for_a_worker_that_dies_are_told(site: Site, gate: Gate) -> None:
    async with site.engine() as engine:

        async def call() -> None:
            with pytest.raises(WorkerDied, match="exit code -9"):
                await engine.collective_rpc("wait", args=(str(gate.path),))

        async with anyio.create_task_group() as group:
            group.start_soon(call)
            await gate.reached()
            site.kill()
        await site.witness.done.wait()
        assert await engine.collective_rpc("ping") == ["pong"]


async def test_a_worker_that_slept_sleeps_again(site: Site) -> None:
    async with site.engine() as engine:
        await engine.sleep(2)
        site.kill()
        await site.witness.done.wait()
        assert await engine.collective_rpc("asleep") == [2]
        await engine.wake_up()
        assert await engine.collective_rpc("asleep") == [None]
        site.witness.done = anyio.Event()
        site.kill()
        await site.witness.done.wait()
        assert await engine.collective_rpc("asleep") == [None]


async def test_who_is_told_to_sleep_meanwhile_does_so_when_the_worker_is_there(site: Site, gate: Gate) -> None:
    async with site.engine("ok", f"gate {gate.path}") as engine, anyio.create_task_group() as group:
        await engine.generate("a", seed=1)
        site.kill()
        await gate.reached()
        group.start_soon(engine.sleep, 2)
        await anyio.wait_all_tasks_blocked()
        gate.open()
        await site.witness.done.wait()
        await anyio.wait_all_tasks_blocked()
        while await engine.collective_rpc("asleep") != [2]:
            pass


async def test_many_deaths_leave_no_sockets_behind(site: Site, temporary: Path) -> None:
    async with site.engine() as engine:
        (folder,) = content(temporary)
        files = psutil.Process().num_fds()
        for _ in range(5):
            site.witness.done = anyio.Event()
            site.kill()
            await site.witness.done.wait()
            await engine.collective_rpc("ping")
        assert len(content(folder)) == 1
        while psutil.Process().num_fds() > files:  # a thread of ZeroMQ closes them
            await anyio.lowlevel.checkpoint()


@pytest.mark.parametrize("run_ahead", [False, True])
async def test_it_works_with_one_and_with_two_ticks_in_flight(site: Site, tmp_path: Path, run_ahead: bool) -> None:
    alive = tmp_path / "kill"
    alive.touch()
    async with site.engine(run_ahead=run_ahead, max_batch=2, max_retries=3) as engine:
        async with asking(engine) as asked:
            for i in range(8):
                asked.ask(f"r{i}", kill=str(alive), at=1 + i % STEPS)
            while len(site.loads) < 3:
                await anyio.lowlevel.checkpoint()
            alive.unlink()
        asked.all_but()
        assert len(asked.outcomes) == 8


async def test_the_server_says_that_it_recovers_and_counts_it(site: Site, gate: Gate) -> None:
    registry = CollectorRegistry()
    async with recovering(site, gate) as (engine, _):
        engine.observers.append(EngineMetrics(engine, registry))
        async with local(create_app(engine)) as client:
            answers = [await client.get(path) for path in ("/live", "/ready", "/health")]
            why = "recovering: worker 0 died with exit code -9"
            assert [(answer.status_code, answer.json()) for answer in answers] == [
                (200, {"status": "live"}),
                (503, {"status": "not ready", "why": why}),
                (200, {"status": "recovering", "why": why, "requests": 0}),
            ]
            assert registry.get_sample_value("steploom_recovering") == 1
            gate.close()
            await site.witness.done.wait()
            answers = [await client.get(path) for path in ("/ready", "/health")]
            assert [answer.status_code for answer in answers] == [200, 200]
            assert answers[1].json()["status"] == "healthy"
        site.witness.done = anyio.Event()
        site.kill()
        await site.witness.done.wait()
        values = {
            name: registry.get_sample_value(f"steploom_{name}") for name in ("recovering", "worker_restarts_total")
        }
        assert values == {"recovering": 0, "worker_restarts_total": 2}
        assert registry.get_sample_value("steploom_worker_faults_total", {"fault": "died"}) == 1
