"""The world in which an engine is operated while its workers die, at moments that a seed has drawn.

Engine, fleet, flights and agenda are the real ones; workers only count steps.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import anyio.lowlevel
from fake_fleet import FakeFleet
from fakes import assert_empty, settled

from steploom import AsyncDiffusionEngine, EngineConfig, EngineError, EngineNotRunning, RequestCancelled, WorkerDied
from steploom.executor.abstract import ProgressCallback
from steploom.protocol import PipelineInfo, RunnerOutput, SchedulerOutput
from steploom.requests import DiffusionRequest, Restarted
from steploom.worker.agenda import Agenda

Operation = Callable[[AsyncDiffusionEngine], Awaitable[object]]

REQUESTS = 10

_CANNOT_BE = re.compile("under way|is paused|sleeps|drains|closed|not this time|being replaced")


class Frail:
    """A worker: it dies in a tick, or between two, and another one takes its place."""

    def __init__(self, limit: int) -> None:
        self.agenda = Agenda(limit)
        self.turn = anyio.Lock()
        self.resident: dict[str, tuple[DiffusionRequest, int]] = {}


class FrailFleet(FakeFleet):
    """Frail workers, which take their time; some do not start."""

    ticks_in_flight = 2
    world: World

    def __init__(self, config: EngineConfig, pipeline: Any = None) -> None:
        super().__init__(config, pipeline)
        self.frail = defaultdict[int, Frail](lambda: Frail(config.resident_limit))
        self.world.made.append(self)

    async def _init_executor(self, on_progress: ProgressCallback) -> PipelineInfo:
        await self._load()
        return await super()._init_executor(on_progress)

    async def _load(self) -> None:
        await self.world.some_turns(60)
        if len(self.world.made) > 1 and self.world.chance(0.2):
            raise EngineError("not this time")

    async def execute_step(self, output: SchedulerOutput) -> RunnerOutput:
        self.log.append(output)
        worker = self.frail[output.worker]
        async with worker.turn:
            tick, amended = worker.agenda.begin(output)
            await self.world.some_turns(3)
            if self.deaths[output.worker].is_set():
                if self.world.chance(0.5):
                    raise WorkerDied(output.worker, -9)
                await anyio.sleep_forever()
            self.resident = worker.resident
            result = self.answer(tick)
            worker.agenda.end(tick, result, amended)
            return result

    def amend(self, output: SchedulerOutput) -> None:
        if self.deaths[output.worker].is_set():
            raise WorkerDied(output.worker, -9)
        self.frail[output.worker].agenda.amend(output)

    async def recover(self, worker: int = 0) -> None:
        await self._load()
        self.frail.pop(worker, None)
        self.deaths[worker] = anyio.Event()

    async def remove_worker(self) -> None:
        self.frail.pop(len(self.deaths) - 1, None)
        await super().remove_worker()


class World:
    """Requests, an operator and deaths, side by side.

    Args:
        seed: Draws all of them.

    Attributes:
        made: The executors, one for each model, by age.
        told: The events of each request.
        became: The outcome of each.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.made: list[FrailFleet] = []
        self.told = defaultdict[str, list[Any]](list)
        self.became: dict[str, Any] = {}

    def chance(self, likely: float) -> bool:
        return self._random.random() < likely

    async def some_turns(self, most: int) -> None:
        """Lets the others go on, for less than so many turns of the event loop."""
        for _ in range(self._random.randrange(most)):
            await anyio.lowlevel.checkpoint()

    async def run(self) -> None:
        """All of it; checks what must hold."""
        kind = type("Here", (FrailFleet,), {"world": self, "ticks_in_flight": self._random.choice([1, 2])})
        config = EngineConfig(
            distributed_executor_backend=kind, data_parallel_size=self._random.choice([1, 1, 2, 3]),
            max_batch=self._random.choice([1, 2, 4]), max_retries=99, costs_file=None,
        )  # fmt: skip
        async with AsyncDiffusionEngine(config) as engine:
            with anyio.fail_after(20):
                async with anyio.create_task_group() as group:
                    for number in range(REQUESTS):
                        group.start_soon(self._ask, engine, f"r{number}")
                    for _ in range(self._random.randrange(1, 4)):
                        group.start_soon(self._operate, engine)
                    group.start_soon(self._kill)
                if engine.serves:
                    await self._calm(engine)
        self._check()

    async def _ask(self, engine: AsyncDiffusionEngine, name: str) -> None:
        await self.some_turns(80)
        steps = self._random.choice([1, 3, 8, 30])
        try:
            async with engine.stream(name, request_id=name, num_inference_steps=steps) as run:
                self.told[name] = [event async for event in run]
                self.became[name] = (await run.result()).images
        except (EngineNotRunning, RequestCancelled) as error:  # it sleeps, drains, was closed; or that was aborted
            self.became[name] = error

    async def _kill(self) -> None:
        for _ in range(self._random.randrange(5)):
            await self.some_turns(50)
            executor = self._random.choice(self.made)
            if executor.deaths and not executor.shut:
                self._random.choice(executor.deaths).set()

    async def _operate(self, engine: AsyncDiffusionEngine) -> None:
        operations: list[Operation] = [
            *[self._reload] * 4, self._leave_reload, self._scale, self._pause, self._drain, self._sleep,
            lambda engine: engine.abort(f"r{self._random.randrange(REQUESTS)}"),
            lambda engine: engine.close(),
        ]  # fmt: skip
        await self.some_turns(60)
        await self._try(self._random.choice(operations), engine)

    async def _try(self, operation: Operation, engine: AsyncDiffusionEngine) -> None:
        """It may say that it cannot be, by now."""
        try:
            await operation(engine)
        except EngineError as error:
            if not _CANNOT_BE.search(str(error)):
                raise

    async def _reload(self, engine: AsyncDiffusionEngine) -> None:
        await engine.reload(**self._random.choice([{}, {"data_parallel_size": self._random.choice([1, 2])}]))

    async def _leave_reload(self, engine: AsyncDiffusionEngine) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(self._try, self._reload, engine)
            await self.some_turns(90)
            group.cancel_scope.cancel()

    async def _scale(self, engine: AsyncDiffusionEngine) -> None:
        await engine.scale(self._random.choice([1, 2, 3]), drain_s=self._random.choice([None, 0]))

    async def _pause(self, engine: AsyncDiffusionEngine) -> None:
        await engine.pause()
        await self.some_turns(40)
        await engine.resume()

    async def _drain(self, engine: AsyncDiffusionEngine) -> None:
        await engine.drain(self._random.choice([None, 0]))
        await engine.resume()

    async def _sleep(self, engine: AsyncDiffusionEngine) -> None:
        await engine.sleep()
        while engine.asleep:
            await self._try(AsyncDiffusionEngine.wake_up, engine)
            await anyio.lowlevel.checkpoint()

    async def _calm(self, engine: Any) -> None:
        """When all is over it serves, and nothing is left of anybody."""
        operations = engine._operations
        await operations.until(lambda: operations.cores == [engine._core])
        assert (engine.paused, engine.draining, engine.asleep) == (False, False, False)
        assert (await engine.generate("after")).images == ["after"]
        await settled(engine)
        engine._core.executor.resident.clear()
        assert_empty(engine)
        for worker in engine._core.executor.frail.values():
            assert not worker.resident
            assert not worker.agenda.busy

    def _check(self) -> None:
        assert len(self.became) == REQUESTS
        assert all(executor.shut == 1 for executor in self.made)
        homes = defaultdict[str, set[int]](set)
        for number, executor in enumerate(self.made):
            for output in executor.log:
                for new in output.scheduled_new_reqs:
                    homes[new.request.prompt].add(number)
        assert all(len(models) == 1 for models in homes.values()), f"one model makes one output: {homes}"
        for name, became in self.became.items():
            assert isinstance(became, Exception) or became == [name]
            attempts = [event.attempt for event in self.told[name] if isinstance(event, Restarted)]
            assert attempts == sorted(set(attempts)), name
