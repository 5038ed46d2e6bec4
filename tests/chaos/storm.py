"""A storm: workers are killed, stopped and misunderstood, forwards fail, clients leave, clocks jump.

Each accepted request has exactly one outcome: the image that ``pipe(...)`` alone gives, its client's own leaving, its
own time-out, or the failure that was meant for it. Nothing is left when the engine has closed.

Each kind of accident happens in its turn, and a storm goes on until it has, and some requests were done after it: how
much of a storm there is depends on no clock.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import anyio
import anyio.lowlevel
import psutil
import storm_model
import torch
from processes import content
from storm_model import VICTIM_STEPS, called_for
from storm_wire import AGAIN, Stormy, Undead

from steploom import (
    AsyncDiffusionEngine,
    DeadlineExceeded,
    DiffusionOutput,
    DiffusionRequest,
    GenerationFailed,
    RequestCancelled,
    StepEvent,
)
from steploom.engine.observer import EngineObserver
from steploom.errors import EngineError, SteploomError
from steploom.executor import multiproc

KINDS = 12
CLIENTS = 10
AFTERWARDS = 5
"""Requests that are done after an accident, before the next."""
TRIES = 20
"""How often an id is used again, until that comes in time: where memory was short, batches have no room for a while."""
HANG_S = 100.0
"""Only what hangs takes longer for one accident."""

SIGNS = {
    "kill": "WorkerDied", "stop": "TickTimeout", "revive": "stale answer",
    "cut answer": "ProtocolError", "cut command": "ProtocolError", "again": "kept",
    "memory": "", "nan": "failed (check_finite=True)", "fault": "failed (pretended)", "clock": "",
    "late answer": "late answer", "late command": "late command", "abort": "aborted", "leave": "left",
    "time out": "timed out",
}  # fmt: skip
"""The accidents of a storm, in order, and what happens then; nothing that is seen from outside: no text.

Those that a worker does not outlive come first, so that the last worker has met with all others.
"""


def arguments(kind: int) -> dict[str, Any]:
    sizes = {"height": 32, "width": (32, 32, 48)[kind % 3], "max_sequence_length": 16}
    steps = 3 + kind % 4 if kind < KINDS else VICTIM_STEPS
    return {"num_inference_steps": steps, "guidance_scale": (1.0, 5.0)[kind % 2], **sizes}


def images() -> list[torch.Tensor]:
    """What the pipeline alone gives for each kind of request."""
    pipe = storm_model.make()
    pipe.set_progress_bar_config(disable=True)
    return [
        pipe(
            f"a cat, {kind}", generator=torch.Generator().manual_seed(kind), output_type="pt", **arguments(kind)
        ).images
        for kind in range(KINDS)
    ]


class Storm(EngineObserver):
    """Clients of one engine, and their accidents.

    Attributes:
        seen: How many requests ended how, and workers were lost of what.
        met: How often each accident has happened.
        wrong: What must not have happened.
        open: For each request that was accepted how often, less how often it had an outcome.
        now: The accident that happens.
        kept: Set when the answer that ends the request ``AGAIN`` is held back.
    """

    def __init__(self, seed: int) -> None:
        self.luck = random.Random(seed)
        self.expected = images()
        self.seen: Counter[str] = Counter()
        self.met: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.open: Counter[str] = Counter()
        self.now = ""
        self.kept = anyio.Event()
        self._changed = anyio.Event()
        self._over = False
        self._real_time = time.time

    def note(self, what: str) -> None:
        self.seen[what] += 1
        self._changed.set()
        self._changed = anyio.Event()

    def on_queued(self, request: DiffusionRequest) -> None:
        self.open[request.request_id] += 1

    def on_end(self, request_id: str, output: DiffusionOutput | None, error: SteploomError | None) -> None:
        self.open[request_id] -= 1

    def on_fault(self, fault: EngineError) -> None:
        self.note(type(fault).__name__)

    async def until(self, so: Callable[[], bool]) -> None:
        while not so() and not self.wrong:
            await self._changed.wait()

    async def rage(self, engine: AsyncDiffusionEngine, seconds: float) -> None:
        """All accidents in their order; after ``seconds`` no others."""
        until, order = time.monotonic() + seconds, list(SIGNS)
        async with anyio.create_task_group() as clients:
            for number in range(CLIENTS):
                clients.start_soon(self.client, engine, number)
            try:
                while not self.wrong and (order or time.monotonic() < until):
                    order = order or self.luck.sample(list(SIGNS), len(SIGNS))
                    await self.accident(engine, order.pop(0))
            finally:
                self._over = True

    async def accident(self, engine: AsyncDiffusionEngine, name: str) -> None:
        """Has it happen, and returns when that is over."""
        sign = SIGNS[name]
        self.now, before = name, self.seen[sign]
        try:
            with anyio.fail_after(HANG_S):
                called_for(name).touch()
                if name in ("nan", "fault"):
                    await self.request(engine, f"{name}-{before}", KINDS, meant=sign)
                    called_for(name).unlink()
                elif name in ("abort", "leave", "time out"):
                    await self.leaver(engine, f"{name}-{before}", name)
                    called_for(name).unlink()
                elif name == "again":
                    again = self.seen[AGAIN]
                    for _ in range(TRIES):
                        if self.seen[AGAIN] == again and not self.wrong:
                            await self.again(engine)
                elif name == "clock":
                    jump = self.luck.uniform(-1e5, 1e5)
                    time.time = lambda: self._real_time() + jump
                await self.until(lambda: not called_for(name).exists() and (not sign or self.seen[sign] > before))
                done = self.seen["done"]
                await self.until(lambda: self.seen["done"] >= done + AFTERWARDS)
                self.met[name] += 1
        except TimeoutError:
            self.wrong.append(f"{name}: nothing came of it, or nothing was done afterwards: {dict(self.seen)}")

    async def client(self, engine: AsyncDiffusionEngine, number: int) -> None:
        while not (self._over or self.wrong):  # under its one id, also when the worker has its last one still
            await self.request(engine, f"c{number}", self.luck.randrange(KINDS))

    async def request(self, engine: AsyncDiffusionEngine, name: str, kind: int, meant: str = "") -> None:
        """One request; of those that no accident is meant for some are left, aborted, or late."""
        fate = 1.0 if meant else self.luck.random()
        timeout = self.luck.uniform(0.01, 1.0) if fate < 0.1 else 10 * HANG_S
        leaves, ends = (self.luck.uniform(0.0, 0.3) if low <= fate < low + 0.1 else None for low in (0.1, 0.2))
        try:
            with anyio.move_on_after(leaves):
                async with anyio.create_task_group() as group:
                    if ends is not None:
                        group.start_soon(self.abort, engine, name, ends)
                    out = await self.generate(engine, name, kind, timeout)
                    group.cancel_scope.cancel()
                if meant:
                    self.end("done", False, f"{name}: was meant to end as: {meant}")
                    return
                self.judge(name, kind, out)
                return
            self.end("left", True, name)
        except* DeadlineExceeded:
            self.end("timed out", timeout <= 1, f"{name}: {timeout} s")
        except* RequestCancelled as errors:
            self.end("aborted", ends is not None, f"{name}: {errors.exceptions}")
        except* GenerationFailed as errors:
            told = str(errors.exceptions)
            word = next((word for word in ("check_finite=True", "pretended") if word in told), None)
            self.end(f"failed ({word})", meant == f"failed ({word})", f"{name}: {told}")

    def judge(self, name: str, kind: int, out: DiffusionOutput) -> None:
        far = (out.images[0] - self.expected[kind][0]).abs().max().item() * 255
        self.end("done", far <= 1, f"{name}, kind {kind}: differs by {far:.1f} grey levels")

    async def again(self, engine: AsyncDiffusionEngine) -> None:
        """An id is used again before the answer that ends its first request has come, which is for another kind."""
        self.kept = anyio.Event()
        called_for("again").touch()

        async def first() -> None:
            with contextlib.suppress(RequestCancelled):
                await self.generate(engine, AGAIN, 0, 10 * HANG_S)

        async with anyio.create_task_group() as group:
            group.start_soon(first)
            await self.kept.wait()
            await engine.abort(AGAIN)
            self.judge(AGAIN, 1, await self.generate(engine, AGAIN, 1, 10 * HANG_S))

    @staticmethod
    async def generate(engine: AsyncDiffusionEngine, name: str, kind: int, timeout: float) -> Any:
        given = {"request_id": name, "timeout": timeout, "output_type": "pt", **arguments(kind)}
        return await engine.generate(f"a cat, {kind}", seed=kind, **given)

    @staticmethod
    async def abort(engine: AsyncDiffusionEngine, name: str, seconds: float) -> None:
        await anyio.sleep(seconds)
        await engine.abort(name)

    async def leaver(self, engine: AsyncDiffusionEngine, name: str, how: str) -> None:
        """A client that goes in the middle, whatever the machine's speed: its request has steps without end."""
        endless = {**arguments(0), "num_inference_steps": 1000}
        timeout = 1.0 if how == "time out" else 10 * HANG_S
        try:
            async with engine.stream("a dog", seed=1, request_id=name, timeout=timeout, **endless) as run:
                async for event in run:
                    if how == "leave" and isinstance(event, StepEvent):
                        break
                    if how == "abort" and isinstance(event, StepEvent):
                        await engine.abort(name)
            self.end("left", how == "leave", name)
        except RequestCancelled:
            self.end("aborted", how == "abort", name)
        except DeadlineExceeded:
            self.end("timed out", how == "time out", name)

    def end(self, how: str, fine: bool, told: str) -> None:
        if not fine:
            self.wrong.append(f"{how}: {told}")
        self.note(how)

    async def quiet(self, engine: AsyncDiffusionEngine) -> dict[str, int]:
        """What the worker holds when nobody wants anything."""
        # with this one the worker is told to forget those whose clients have just left
        await self.generate(engine, f"quiet-{self.seen.total()}", 0, HANG_S)
        stats = await engine.collective_rpc("stats", unique_reply_rank=0)
        return {"resident": stats.resident, "greenlets": await engine.collective_rpc("greenlets", unique_reply_rank=0)}


async def storm(seconds: float, seed: int) -> Storm:
    """Runs one until each accident has happened, and for so many seconds. Nothing is left of the engine."""
    with tempfile.TemporaryDirectory(prefix="storm-") as folder:
        accidents, temporary = Path(folder, "accidents"), Path(folder, "tmp")
        for made in (accidents, temporary):
            made.mkdir()
        own = {"STORM": str(accidents), "TMPDIR": str(temporary)}
        with (
            mock.patch.dict(os.environ, own),
            mock.patch.object(tempfile, "tempdir", str(temporary)),
            mock.patch.object(multiproc, "WorkerSocket", Stormy),
            mock.patch.object(multiproc, "WorkerProcess", Undead),
            mock.patch.object(time, "time", time.time),
        ):
            found = Stormy.storm = Undead.storm = Storm(seed)
            before = left()
            await _weathered(found, seconds)
            with anyio.move_on_after(20):
                while left() != before:  # a thread of ZeroMQ closes its descriptors
                    await anyio.lowlevel.checkpoint()
            if (after := left()) != before:
                found.wrong.append(f"left behind: {after}, at first {before}")
            if names := content(temporary):
                found.wrong.append(f"left behind: {names}")
    return found


async def _weathered(found: Storm, seconds: float) -> None:
    async with AsyncDiffusionEngine(
        model="storm_model:make", max_batch=6, torch_threads=1, max_retries=6, tick_timeout_s=5.0,
        restart_backoff_s=0.01, check_finite=True, costs_file=None, worker_extension="storm_model.Counts",
    ) as engine:  # fmt: skip
        engine.observers.append(found)
        before = await found.quiet(engine)
        await found.rage(engine, seconds)
        if not found.wrong and (after := await found.quiet(engine)) != before:
            found.wrong.append(f"a quiet worker has {after}, at first {before}")
        if before["resident"]:
            found.wrong.append(f"a quiet worker has {before}")
    if odd := {name: count for name, count in found.open.items() if count}:
        found.wrong.append(f"no outcome, or more than one: {odd}")


def left() -> dict[str, Any]:
    """What a closed engine must not have added to."""
    own = psutil.Process()
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    return {
        "processes": len(own.children(recursive=True)),
        "sockets": len(own.net_connections("unix")),
        "descriptors": own.num_fds(),
        "threads of ours": sum("steploom" in thread.name for thread in threading.enumerate()),
        "tasks": len(tasks),
    }
