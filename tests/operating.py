"""Engines over fakes that somebody operates while requests run, and what became of each."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import anyio
from fakes import FakeExecutor, fake_engine

from steploom import AsyncDiffusionEngine, EngineConfig
from steploom.executor.abstract import ProgressCallback
from steploom.protocol import PipelineInfo


class Outcomes:
    """Requests that run side by side in a group, and what became of each."""

    def __init__(self, engine: AsyncDiffusionEngine, group: Any) -> None:
        self._engine, self._group = engine, group
        self.of: dict[str, Any] = {}
        self._changed = anyio.Event()

    async def ask(self, *names: str, **params: Any) -> None:
        """Asks for these; returns when they are accepted."""
        for name in names:
            self._group.start_soon(self._one, name, params)
        await anyio.wait_all_tasks_blocked()

    async def _one(self, name: str, params: dict[str, Any]) -> None:
        try:
            self.of[name] = await self._engine.generate(name, request_id=name, **params)
        except Exception as error:  # noqa: BLE001 - it is the outcome
            self.of[name] = error
        self._changed.set()
        self._changed = anyio.Event()

    async def told(self, name: str) -> Any:
        """The outcome of one."""
        while name not in self.of:
            await self._changed.wait()
        return self.of[name]

    @property
    def done(self) -> list[str]:
        return sorted(name for name, outcome in self.of.items() if not isinstance(outcome, Exception))


@contextlib.asynccontextmanager
async def busy(kind: type[FakeExecutor] = FakeExecutor, names: str = "ab", **config: Any) -> AsyncIterator[Any]:
    """An engine that runs some requests, whose first tick is held."""
    async with fake_engine(kind, **config) as (engine, executor), anyio.create_task_group() as group:
        executor.held = True
        asked = Outcomes(engine, group)
        await asked.ask(*names)
        yield engine, executor, group, asked


class SlowStart(FakeExecutor):
    """Loads until it is told that it has."""

    async def _init_executor(self, on_progress: ProgressCallback) -> PipelineInfo:
        self.loaded = anyio.Event()
        await self.loaded.wait()
        return await super()._init_executor(on_progress)


def held(config: EngineConfig, pipeline: Any = None) -> FakeExecutor:
    """A worker that holds its first tick."""
    made = FakeExecutor(config)
    made.held = True
    return made


def prompts(executor: FakeExecutor) -> list[str]:
    """Whom it was given, in order."""
    return [new.request.prompt for output in executor.log for new in output.scheduled_new_reqs]
