"""A storm: workers are killed, stopped and misunderstood, forwards fail, clients leave, clocks jump.

Each accepted request has exactly one outcome: the image that ``pipe(...)`` alone gives, its client's own leaving, its
own time-out, or a failure that an accident of its own explains. Nothing is left when the engine has closed.
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections import Counter
from typing import Any

import anyio
import psutil
import storm_model
import torch

from steploom import AsyncDiffusionEngine, DeadlineExceeded, GenerationFailed
from steploom.engine.observer import EngineObserver
from steploom.errors import EngineError
from steploom.executor import MultiprocExecutor

KINDS = 12
CLIENTS = 10
EXPLAINED = ("check_finite=True", "pretended", "gave up after")


class Damaged(MultiprocExecutor):
    """Of its workers' messages a few arrive cut off."""

    luck = random.Random(0)

    def _make(self, rank: int) -> Any:
        worker = super()._make(rank)
        whole = worker.socket._decode

        def cut(buffers: list[memoryview]) -> Any:
            hit = self.luck.random() < 0.002
            return whole([buffers[0][: len(buffers[0]) // 2], *buffers[1:]] if hit else buffers)

        worker.socket._decode = cut
        return worker


class Faults(EngineObserver):
    """Counts workers that were lost, by what they were lost of."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()

    def on_fault(self, fault: EngineError) -> None:
        self.kinds[type(fault).__name__] += 1


def arguments(kind: int) -> dict[str, Any]:
    sizes = {"height": 32, "width": (32, 32, 48)[kind % 3], "max_sequence_length": 16}
    return {"num_inference_steps": 3 + kind % 4, "guidance_scale": (1.0, 5.0)[kind % 2], **sizes}


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


class Storm:
    """Clients of one engine for some seconds.

    Attributes:
        outcomes: How many requests ended how.
        wrong: What must not have happened.
    """

    def __init__(self, seconds: float, seed: int) -> None:
        self.until = time.monotonic() + seconds
        self.luck = random.Random(seed)
        self.expected = images()
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []

    async def client(self, engine: AsyncDiffusionEngine, number: int) -> None:
        count = 0
        while time.monotonic() < self.until and not self.wrong:
            count += 1
            await self.request(engine, f"c{number}-{count}")

    async def request(self, engine: AsyncDiffusionEngine, name: str) -> None:
        kind, fate = self.luck.randrange(KINDS), self.luck.random()
        timeout = self.luck.uniform(0.01, 1.0) if fate > 0.9 else 120.0
        leaves = self.luck.uniform(0.0, 0.3) if fate < 0.3 else None
        try:
            with anyio.move_on_after(leaves):
                out = await engine.generate(
                    f"a cat, {kind}", seed=kind, request_id=name, timeout=timeout, output_type="pt", **arguments(kind)
                )
                far = (out.images[0] - self.expected[kind][0]).abs().max().item() * 255
                self.end("done", far <= 1.5, f"{name}, kind {kind}: differs by {far:.1f} grey levels")
                return
            self.end("left", True, name)
        except DeadlineExceeded:
            self.end("timed out", timeout < 2, f"{name}: {timeout} s")
        except GenerationFailed as error:
            word = next((word for word in EXPLAINED if word in str(error)), None)
            self.end(f"failed ({word})", word is not None, f"{name}: {error}")

    def end(self, how: str, fine: bool, told: str) -> None:
        self.outcomes[how] += 1
        if not fine:
            self.wrong.append(f"{how}: {told}")

    async def clocks(self) -> None:
        """The wall clock jumps by hours; nothing may go by it."""
        real = time.time
        try:
            while True:
                await anyio.sleep(0.5)
                jump = self.luck.uniform(-1e4, 1e4)
                time.time = lambda jump=jump: real() + jump
        finally:
            time.time = real


async def storm(seconds: float, seed: int) -> tuple[Storm, Counter[str]]:
    """Runs one; what it came to, and what workers were lost of. Nothing is left of the engine."""
    found, faults, Damaged.luck = Storm(seconds, seed), Faults(), random.Random(seed)
    before = left()
    os.environ["STORM"] = "on"
    try:
        async with AsyncDiffusionEngine(
            model="storm_model:make", distributed_executor_backend=Damaged, max_batch=6, torch_threads=1,
            max_retries=6, tick_timeout_s=3.0, restart_backoff_s=0.01, check_finite=True, costs_file=None,
        ) as engine:  # fmt: skip
            engine.observers.append(faults)
            async with anyio.create_task_group() as jumps:
                jumps.start_soon(found.clocks)
                async with anyio.create_task_group() as clients:
                    for number in range(CLIENTS):
                        clients.start_soon(found.client, engine, number)
                jumps.cancel_scope.cancel()
    finally:
        del os.environ["STORM"]
    if (after := left()) != before:
        found.wrong.append(f"left behind: {after}, at first {before}")
    return found, faults.kinds


def left() -> dict[str, Any]:
    """What a closed engine must not have added to."""
    own = psutil.Process()
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    return {
        "processes": len(own.children(recursive=True)),
        "sockets": len(own.net_connections("unix")),
        "threads of ours": sum("steploom" in thread.name for thread in threading.enumerate()),
        "tasks": len(tasks),
    }
