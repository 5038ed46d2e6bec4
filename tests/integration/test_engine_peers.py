"""What other engines got wrong (section 8 of the design), by name, over a real pipeline."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path
from typing import Any

import anyio
import pytest
from fakes import settled

from steploom import InvalidRequest, RequestCancelled, RequestError, StepEvent

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def stats(engine: Any) -> Any:
    return await engine.collective_rpc("stats", timeout=60, unique_reply_rank=0)


async def test_poison(engine: Any) -> None:
    """Requests that do not go together, and some that fail, leave the healthy ones in flight alone."""
    import torch

    healthy: list[Any] = [
        {},
        {"negative_prompt": "a dog"},
        {"guidance_scale": 1.0},
        {"num_images_per_prompt": 3},
        {"width": 64},
        {"max_sequence_length": 8},
    ]
    sick: list[tuple[type[RequestError], Any]] = [
        (InvalidRequest, {"width": 33}),
        (RequestError, {"negative_prompt": 5}),
        (RequestError, {"latents": torch.zeros(1, 3, 16, 16)}),
        (RequestError, {"joint_attention_kwargs": {"no": "such"}}),
    ]
    done: list[Any] = []

    async def live(params: Any) -> None:
        done.append(await engine.generate("a cat", num_inference_steps=6, **params))

    async def die(kind: type[RequestError], params: Any) -> None:
        with pytest.raises(kind):
            await engine.generate("a cat", num_inference_steps=6, **params)
        done.append(kind)

    async with anyio.create_task_group() as group:
        for params in healthy[:3]:
            group.start_soon(live, params)
        for kind, params in sick[:3]:
            group.start_soon(die, kind, params)
        for params in healthy[3:]:
            group.start_soon(live, params)
    assert len(done) == 9
    await settled(engine)
    assert (await stats(engine)).resident == 0


async def test_lost_abort(engine: Any) -> None:
    """An abort in any tick of the last request ends it at once, without another request coming along."""
    outcomes: set[str] = set()
    for patience in range(6):
        async with engine.stream("a cat", num_inference_steps=4) as run:
            for _ in range(patience):
                await run.__anext__()
            await engine.abort(run.request_id)
            try:
                with anyio.fail_after(30):
                    await run.result()
                outcomes.add("finished")
            except RequestCancelled:
                outcomes.add("aborted")
    assert "aborted" in outcomes


async def test_deferred_free(engine: Any) -> None:
    """The worker forgets the only request by the next step, although nobody else asks for anything."""
    async with engine.stream("a cat", num_inference_steps=500) as run:
        async for event in run:
            if isinstance(event, StepEvent) and event.step >= 2:
                break
        assert (await stats(engine)).resident == 1
    await settled(engine)
    ticks = (await stats(engine)).ticks
    assert (await stats(engine)).resident == 0
    assert (await stats(engine)).ticks == ticks


async def test_drain_bubble(engine: Any) -> None:
    """One larger request ahead of eight smaller ones does not keep them from filling the batch."""
    shared: list[float] = []

    async def small() -> None:
        out = await engine.generate("a cat", num_inference_steps=12)
        shared.append(out.timings.mean_batch_requests)

    async with engine.stream("a cat", width=64, height=64, num_inference_steps=40) as large:
        async for event in large:
            if isinstance(event, StepEvent):
                break
        async with anyio.create_task_group() as group:
            for _ in range(8):
                group.start_soon(small)
        steps = [event.step async for event in _unread(large)]
    assert len(shared) == 8
    assert min(shared) >= 2.5  # of max_batch=4; drained to one it would be 1.0
    assert steps  # and the larger one was not starved meanwhile


async def _unread(run: Any) -> Any:
    """What the stream holds now, and the first event after it."""
    event = await run.__anext__()
    if isinstance(event, StepEvent):
        yield event


async def test_rpc_behind_generations(engine: Any) -> None:
    """A collective RPC is answered between two ticks, not after the generations."""
    async with engine.stream("a cat", num_inference_steps=500) as run:
        async for event in run:
            if isinstance(event, StepEvent):
                break
        for _ in range(5):
            assert await engine.collective_rpc("ping", timeout=30, unique_reply_rank=0) == "pong"
        events = await run.__anext__()
        assert isinstance(events, StepEvent)
        assert events.step < 250


@pytest.mark.alone
async def test_blocked_loop(mp_engine: Any) -> None:
    """With 16 requests over a worker process the event loop is never blocked for more than 50 ms.

    Wall time, less what this thread spent waiting for a processor and what a hypervisor took away of them. The best of
    three rounds counts: what blocks the loop does so in each, what disturbs the machine does not.
    """
    worst = [await _longest_block(mp_engine)]
    while worst[-1] >= 0.05 and len(worst) < ROUNDS:
        worst.append(await _longest_block(mp_engine))
    assert min(worst) < 0.05, worst


@pytest.mark.alone
@pytest.mark.slow
async def test_blocked_loop_by_the_arguments_of_a_call(mp_engine: Any) -> None:
    """Likewise while a call with a million numbers in lists is sent, which would take a fifth of a second."""
    numbers = [[float(index) for index in range(1000)] for _ in range(1000)]
    worst: list[float] = []
    while len(worst) < ROUNDS and (not worst or worst[-1] >= 0.05):
        async with anyio.create_task_group() as probing:
            lags: list[float] = []
            probing.start_soon(_probe, lags, stop := anyio.Event())
            await anyio.wait_all_tasks_blocked()
            assert await mp_engine.collective_rpc("ping", args=(numbers,), unique_reply_rank=0) == "pong"
            stop.set()
        worst.append(max(lags))
    assert min(worst) < 0.05, worst


async def test_the_probe_of_blocked_loop_sees_a_block() -> None:
    async with anyio.create_task_group() as group:
        lags: list[float] = []
        group.start_soon(_probe, lags, stop := anyio.Event())
        await anyio.wait_all_tasks_blocked()
        time.sleep(0.3)  # noqa: ASYNC251, TID251 - the block that is to be seen, even if a part of it is stolen
        await anyio.sleep(2 * PERIOD_S)
        stop.set()
    assert max(lags) > 0.08


async def _longest_block(engine: Any) -> float:
    """Seconds of the longest block of the event loop while 16 requests of mixed shapes run."""

    async def one(number: int) -> None:
        params = {"preview_every": 2, "latents_every": 1, "num_images_per_prompt": 1 + number % 3}
        async with engine.stream("a cat", width=32 + 32 * (number % 2), num_inference_steps=4, **params) as run:
            async for _ in run:
                pass

    async with anyio.create_task_group() as probing:
        lags: list[float] = []
        probing.start_soon(_probe, lags, stop := anyio.Event())
        async with anyio.create_task_group() as group:
            for number in range(16):
                group.start_soon(one, number)
        stop.set()
    assert len(lags) > 10
    return max(lags)


PERIOD_S = 0.002
ROUNDS = 3


async def _probe(lags: list[float], stop: anyio.Event) -> None:
    """Notes how much later than asked it is woken up, again and again."""
    while not stop.is_set():
        start, waited = time.perf_counter(), _waited_for_processor()
        await anyio.sleep(PERIOD_S)
        lags.append(time.perf_counter() - start - PERIOD_S - (_waited_for_processor() - waited))


def _waited_for_processor() -> float:
    """Seconds that this thread was ready to run and did not, where the system tells (Linux); else 0."""
    with contextlib.suppress(OSError):
        queued = int(Path(f"/proc/self/task/{threading.get_native_id()}/schedstat").read_text().split()[1]) / 1e9
        stolen = int(Path("/proc/stat").read_text().split(maxsplit=9)[8]) / os.sysconf("SC_CLK_TCK")
        return queued + stolen
    return 0.0
