"""A fleet of fakes: several workers, each of which the test can hold, kill, and have replaced."""

from __future__ import annotations

from typing import Any

import anyio
from fakes import FakeExecutor

from steploom import EngineConfig, EngineError, WorkerDied
from steploom.protocol import RunnerOutput, SchedulerOutput


class FakeFleet(FakeExecutor):
    """Workers that only count steps.

    Attributes:
        stuck: By rank what the ticks of a worker wait for.
        told: What was added to ticks.
        deaths: By rank, set when the worker is to die.
        loading: What the start of a worker waits for; None: nothing.
    """

    def __init__(self, config: EngineConfig, pipeline: Any = None) -> None:
        super().__init__(config, pipeline)
        self.stuck: dict[int, anyio.Event] = {}
        self.told: list[SchedulerOutput] = []
        self.deaths = [anyio.Event() for _ in range(self.workers)]
        self.loading: anyio.Event | None = None

    @property
    def workers(self) -> int:
        return self.config.data_parallel_size

    def stick(self, *workers: int) -> None:
        """From now on the ticks of these are held."""
        self.stuck |= {worker: anyio.Event() for worker in workers}

    def free(self, worker: int) -> None:
        """Holds them no more."""
        self.stuck.pop(worker).set()

    async def execute_step(self, output: SchedulerOutput) -> RunnerOutput:
        self.log.append(output)
        await anyio.lowlevel.checkpoint()
        if output.worker in self.stuck:
            await self.stuck[output.worker].wait()
        return self.answer(output)

    def amend(self, output: SchedulerOutput) -> None:
        assert not self.deaths[output.worker].is_set()
        self.told.append(output)

    async def wait_failed(self, worker: int = 0) -> EngineError:
        await self.deaths[worker].wait()
        return WorkerDied(worker, -9)

    def discard(self, fault: EngineError, worker: int = 0) -> bool:
        return True

    async def recover(self, worker: int = 0) -> None:
        await self._load()
        self.deaths[worker] = anyio.Event()

    async def add_worker(self) -> None:
        await self._load()
        self.deaths.append(anyio.Event())

    async def remove_worker(self) -> None:
        self.deaths.pop()
        await anyio.lowlevel.checkpoint()

    async def _load(self) -> None:
        await anyio.lowlevel.checkpoint()
        if self.loading is not None:
            await self.loading.wait()

    async def sleep(self, level: int = 1, worker: int | None = None) -> None:
        await self.collective_rpc("sleep", None, (level, worker))


def homes(executor: FakeFleet, since: int = 0) -> dict[str, int]:
    """By prompt the worker that was given it, as logged from there on."""
    logged = executor.log[since:]
    return {new.request.prompt: output.worker for output in logged for new in output.scheduled_new_reqs}
