"""``max_message_bytes``: what would be more is refused by name; what comes all the same is told, and nobody hangs."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import zmq
from test_executor_attached import attached, started
from test_remote_worker import Engine, listening

from steploom.config import EngineConfig
from steploom.errors import InvalidRequest, ProtocolError
from steploom.executor import MultiprocExecutor
from steploom.executor.worker import Worker
from steploom.protocol import NewRequest, RequestReport, SchedulerOutput
from steploom.requests import DiffusionRequest
from steploom.worker.messages import Call, Configure, Hello, Ready

LIMIT = 2**20
ROOMY = 2**30


class Scripted(MultiprocExecutor):
    """The engine's end and the worker's may differ."""

    runner = "scripted_runner:make"
    engine = worker = LIMIT

    def _make(self, rank: int) -> Worker:
        made = super()._make(rank)
        assert (made.socket.limit, made.process.max_message_bytes) == (LIMIT, LIMIT)
        made.socket.limit, made.process.max_message_bytes = self.engine, self.worker
        return made


class Shouting(Scripted):
    """The worker does not care."""

    worker = ROOMY


class Pushing(Scripted):
    """The engine does not care."""

    engine = ROOMY


@contextlib.asynccontextmanager
async def running(kind: type[Scripted]) -> AsyncIterator[Scripted]:
    executor = kind(EngineConfig(max_message_bytes=LIMIT))
    await executor.start()
    try:
        with anyio.fail_after(60):
            yield executor
    finally:
        await executor.shutdown()


def new(name: str, nbytes: int) -> NewRequest:
    return NewRequest(f"{name}#0", DiffusionRequest("a", image=bytes(nbytes)))


def told(report: RequestReport) -> str:
    assert report.finished
    assert report.error is not None
    assert report.error.kind == "InvalidRequest"
    return report.error.message


async def test_a_request_that_is_too_large_fails_alone() -> None:
    async with running(Scripted) as executor:
        requests = [new("huge", 2 * LIMIT), new("good", 600_000), new("second", 600_000), new("small", 10)]
        answer = await executor.execute_step(SchedulerOutput(1, requests))
        good, small, huge, second = answer.reports
        assert ([good.run_id, small.run_id], len(good.output)) == (["good#0", "small#0"], 600_000)
        assert "max_message_bytes=1048576: these are" in told(huge)
        assert "max_message_bytes=1048576: these are" in told(second)
        assert await executor.collective_rpc("ping") == ["pong"]


async def test_an_output_that_is_too_large_fails_alone() -> None:
    async with running(Scripted) as executor:
        output = SchedulerOutput(1, [], ["a#0", "b#0", "c#0"], batch_key="large 400000")
        first, second, third = (await executor.execute_step(output)).reports
        assert (first.error, second.error, len(second.output)) == (None, None, 400_000)
        assert "max_message_bytes=1048576: these are" in told(third)
        with pytest.raises(InvalidRequest, match="max_message_bytes=1048576: a message of 2"):
            await executor.collective_rpc("large", args=(2 * LIMIT,))
        with pytest.raises(InvalidRequest, match="max_message_bytes=1048576: a message of 2"):
            await executor.collective_rpc("echo", args=(bytes(2 * LIMIT),))
        assert await executor.collective_rpc("ping") == ["pong"]


@pytest.mark.parametrize(("parts", "how"), [(1, "was cut off"), (3, "bytes has come")])
async def test_a_worker_that_sends_more_all_the_same_is_told_of(parts: int, how: str) -> None:
    """One part beyond the limit is not even received; several that come to more are not decoded."""
    async with running(Shouting) as executor:
        with pytest.raises(ProtocolError, match=rf"worker 0: .*max_message_bytes=1048576.*{how}"):
            await executor.collective_rpc("large", args=(2 * LIMIT // parts, parts))
        assert isinstance(await executor.wait_failed(), ProtocolError)


@pytest.mark.parametrize(("parts", "how"), [(1, "was cut off"), (3, "max_message_bytes=1048576.*has come")])
async def test_a_worker_that_is_sent_more_all_the_same_says_so(parts: int, how: str) -> None:
    async with running(Pushing) as executor:
        with pytest.raises(ProtocolError, match=how):
            await executor.collective_rpc("echo", args=tuple(bytes(2 * LIMIT // parts) for _ in range(parts)))


async def test_a_worker_that_is_attached_to_has_the_engine_s_limit(tmp_path_factory: Any) -> None:
    address: Path = tmp_path_factory.mktemp("w") / "worker"
    with started(address):
        for limit in (LIMIT, 4 * LIMIT):
            async with attached(address, max_message_bytes=limit) as executor:
                with pytest.raises(InvalidRequest, match=f"max_message_bytes={limit}"):
                    await executor.collective_rpc("large", args=(limit,))
                assert len((await executor.collective_rpc("large", args=(limit // 2,)))[0][0]) == limit // 2


async def test_over_tcp_what_is_too_large_ends_the_connection() -> None:
    with listening() as (_, door), zmq.Context() as context:
        engine = Engine(context, max_message_bytes=LIMIT)
        try:
            await engine.connect(door)
            await engine.until(Hello)
            engine.socket.send(Configure.of(EngineConfig()))
            await engine.until(Ready)
            engine.socket.send(Call(1, "large", [2 * LIMIT], {}))
            with anyio.fail_after(30):
                await engine.lost.wait()
        finally:
            engine.socket.close()


async def test_over_tcp_a_worker_takes_no_more_than_it_was_told() -> None:
    with listening("127.0.0.1", LIMIT) as (_, door), zmq.Context() as context:
        engine = Engine(context, max_message_bytes=ROOMY)
        try:
            await engine.connect(door)
            await engine.until(Hello)
            engine.socket.send(Configure.of(EngineConfig()))
            await engine.until(Ready)
            engine.socket.send(Call(1, "echo", [bytes(2 * LIMIT)], {}))
            with anyio.fail_after(30):
                await engine.lost.wait()
        finally:
            engine.socket.close()
