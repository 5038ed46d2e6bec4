"""Engines over mortal workers, and what their requests should come to."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import psutil
from mortal_runner import Sum
from scripted_runner import Gate

from steploom import AsyncDiffusionEngine, DiffusionRequest, EngineObserver
from steploom.errors import EngineError
from steploom.executor import MultiprocExecutor

STEPS = 6


class Mortal(MultiprocExecutor):
    runner = "mortal_runner:make"


class Witness(EngineObserver):
    """Notes faults and recoveries; an event for each recovery."""

    def __init__(self) -> None:
        self.faults: list[EngineError] = []
        self.recovered = 0
        self.begun, self.done = anyio.Event(), anyio.Event()

    def on_fault(self, fault: EngineError) -> None:
        self.faults.append(fault)
        self.begun.set()

    def on_recovered(self, seconds: float) -> None:
        assert seconds >= 0
        self.recovered += 1
        self.done.set()


class Site:
    """A model's file, and engines for it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = folder / "model"
        self.witness = Witness()
        self._others = set(psutil.Process().children())

    def workers(self) -> list[psutil.Process]:
        """Processes that were started since, by age: others may have an engine for all of their tests."""
        return [child for child in psutil.Process().children() if child not in self._others]

    @contextlib.asynccontextmanager
    async def engine(self, *plan: str, **config: Any) -> AsyncIterator[AsyncDiffusionEngine]:
        """An engine whose loads go by ``plan``; nothing of it is left afterwards."""
        self.model.write_text("\n".join(plan))
        own = {"distributed_executor_backend": Mortal, "costs_file": None, "restart_backoff_s": 0.001, **config}
        engine = AsyncDiffusionEngine(model=str(self.model), **own)
        engine.observers.append(self.witness)
        tasks, children = asyncio.all_tasks(), set(psutil.Process().children(recursive=True))
        try:
            async with engine:
                yield engine
        finally:
            assert asyncio.all_tasks() == tasks
            assert set(psutil.Process().children(recursive=True)) == children

    @property
    def loads(self) -> list[int]:
        """The worker processes, in order of their start."""
        return [int(line) for line in Path(f"{self.model}.log").read_text().splitlines()]

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Sends the newest worker a signal."""
        os.kill(self.loads[-1], number)


def expected(name: str, steps: int = STEPS) -> int:
    """What a request comes to when nothing happens."""
    one = Sum(DiffusionRequest(name, seed=1))
    for _ in range(steps):
        one.advance()
    return one.total


class Asked:
    """Requests that run side by side, and what became of each."""

    def __init__(self, engine: AsyncDiffusionEngine, group: Any) -> None:
        self._engine, self._group = engine, group
        self.outcomes: dict[str, Any] = {}

    def ask(self, name: str, **params: Any) -> None:
        """Asks for one; its prompt is its id."""
        self._group.start_soon(self._one, name, params)

    async def _one(self, name: str, params: dict[str, Any]) -> None:
        params = {"num_inference_steps": STEPS, **params}
        try:
            self.outcomes[name] = (await self._engine.generate(name, seed=1, request_id=name, **params)).output
        except Exception as error:  # noqa: BLE001 - it is the outcome
            self.outcomes[name] = error

    def all_but(self, *names: str) -> None:
        """All of the others have come to what they should."""
        for name, outcome in self.outcomes.items():
            if name not in names:
                assert outcome == expected(name), name


@contextlib.asynccontextmanager
async def asking(engine: AsyncDiffusionEngine) -> AsyncIterator[Asked]:
    async with anyio.create_task_group() as group:
        yield Asked(engine, group)


@contextlib.asynccontextmanager
async def recovering(site: Site, gate: Gate, **config: Any) -> AsyncIterator[tuple[AsyncDiffusionEngine, Asked]]:
    """An engine whose worker was killed with request ``a``, and whose next one is still loading."""
    async with site.engine("ok", f"gate {gate.path}", **config) as engine, asking(engine) as asked:
        asked.ask("a", gate=str(gate.path))
        await gate.reached()
        gate.open()
        site.kill()
        await gate.reached()
        yield engine, asked
        gate.close()
