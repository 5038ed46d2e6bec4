"""How long an engine waits before it has a worker replaced, and when it gives up."""

from __future__ import annotations

import anyio
import anyio.lowlevel
import pytest
from fake_fleet import FakeFleet
from fakes import FakeExecutor, fake_engine

from steploom import AsyncDiffusionEngine, DiffusionRequest, EngineConfig, EngineDead, WorkerDied
from steploom.engine.observer import Observers
from steploom.engine.recovery import Recovery
from steploom.errors import ConfigError, EngineError
from steploom.protocol import RunnerOutput, SchedulerOutput
from steploom.requests import Restarted


class Replaceable(FakeExecutor):
    """Fails to be replaced as often as ``fails`` says."""

    fails = 0

    def discard(self, fault: EngineError) -> bool:
        return True

    async def recover(self) -> None:
        if self.fails:
            self.fails -= 1
            raise WorkerDied(0, 1, "not this time")


async def nothing() -> None:
    pass


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(anyio, "sleep", sleep)
    return waits


async def test_waits_double_until_a_tick_is_answered(waits: list[float]) -> None:
    config = EngineConfig(restart_backoff_s=0.5, max_restart_backoff_s=7.5)
    recovery = Recovery(Replaceable(config), config, Observers())

    async def again() -> None:
        assert recovery.begin(WorkerDied(0, -9))
        await recovery.run(nothing)
        assert recovery.fault is None

    for _ in range(3):
        await again()
    assert waits == [0.0, 0.5, 1.0]
    recovery.fruitful()
    for _ in range(40):
        await again()
    assert waits[3:6] == [0.0, 0.5, 1.0]
    assert max(waits) == waits[-1] == 7.5


@pytest.mark.parametrize("retries", [0, 2])
async def test_it_gives_up_after_so_many_failed_starts(waits: list[float], retries: int) -> None:
    config = EngineConfig(max_retries=retries)
    executor = Replaceable(config)
    recovery = Recovery(executor, config, Observers())
    executor.fails = retries
    recovery.begin(WorkerDied(0, -9))
    await recovery.run(nothing)
    executor.fails = retries + 1
    recovery.begin(WorkerDied(0, -9))
    with pytest.raises(EngineDead, match=r"not this time; it was lost: worker 0 died with exit code -9"):
        await recovery.run(nothing)
    assert recovery.fault is not None


class Told(Replaceable):
    """Notes what it is told to discard a worker for; fails with ``errors``, one after the other."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.faults: list[str] = []
        self.errors: list[Exception] = []

    def discard(self, fault: EngineError) -> bool:
        self.faults.append(str(fault))
        return True

    async def recover(self) -> None:
        if self.errors:
            raise self.errors.pop(0)


async def test_while_others_serve_it_is_tried_on_and_its_loss_is_said_once(waits: list[float]) -> None:
    config, said = EngineConfig(max_retries=1), list[str]()
    executor = Told(config)
    recovery = Recovery(executor, config, Observers(), 0, lambda: said.append("hopeless"), lambda: True)
    for number in range(1, 3):
        executor.errors = [EngineError(f"not {place}") for place in range(4)]
        recovery.begin(EngineError("lost"))
        await recovery.run(nothing)
        assert (recovery.fault, recovery.hopeless) == (None, False)
        assert said == ["hopeless"] * number
    assert executor.faults == ["lost", "not 0", "not 1", "not 2", "not 3"] * 2, "nothing of a start that failed is left"


async def test_a_start_for_which_the_system_has_nothing_left_is_tried_again(waits: list[float]) -> None:
    config = EngineConfig(max_retries=2)
    executor = Told(config)
    executor.errors = [OSError("too many open files"), ConfigError("a setting"), OSError("no memory")]
    recovery = Recovery(executor, config, Observers())
    recovery.begin(EngineError("lost"))
    with pytest.raises(EngineDead, match=r"tried 3 times \(max_retries=2\): no memory; it was lost: lost"):
        await recovery.run(nothing)
    assert executor.faults == ["lost"], "no worker was started"


class Struck(FakeExecutor):
    """Its first tick, and whoever watches it, hear of its loss in the same turn of the loop."""

    discarded = 0

    async def execute_step(self, output: SchedulerOutput) -> RunnerOutput:
        if not self.discarded:
            raise await self.wait_failed()
        return await super().execute_step(output)

    def discard(self, fault: EngineError) -> bool:
        self.discarded += 1
        self._failed = anyio.Event()
        return True

    async def recover(self) -> None:
        await anyio.lowlevel.checkpoint()


async def test_a_loss_that_several_loops_hear_of_is_one_loss() -> None:
    async with AsyncDiffusionEngine(distributed_executor_backend=Struck, costs_file=None) as engine:
        executor = engine._core.executor
        async with engine.stream("a cat") as run:
            await anyio.wait_all_tasks_blocked()
            executor.die(WorkerDied(0, -9))
            assert [event.attempt async for event in run if isinstance(event, Restarted)] == [1]
        assert executor.discarded == 1


class Ahead(FakeFleet):
    """Takes a tick while the one before it runs."""

    ticks_in_flight = 2

    async def execute_step(self, output: SchedulerOutput) -> RunnerOutput:
        return await super().execute_step(output)


@pytest.mark.parametrize("kind", [FakeFleet, Ahead])
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("busy", [False, True])
async def test_who_comes_in_the_turn_of_the_loop_in_which_a_loss_is_heard_is_not_lost(
    kind: type[FakeFleet], workers: int, busy: bool
) -> None:
    """Its tick loop was about to send a tick, which nobody would have answered."""
    async with (
        fake_engine(kind, data_parallel_size=workers, max_batch=1, max_resident=2) as (engine, executor),
        anyio.create_task_group() as group,
    ):
        if busy:
            executor.stick(*range(workers))
            group.start_soon(engine.generate, "before")
        await anyio.wait_all_tasks_blocked()
        for worker in range(workers):
            executor.deaths[worker].set()
        mailbox = engine._core.submit(DiffusionRequest("a cat"))
        await anyio.wait_all_tasks_blocked()
        for worker in list(executor.stuck):
            executor.free(worker)
        with anyio.fail_after(5):
            assert (await mailbox.outcome()).images == ["a cat"]


class Mortal(FakeExecutor):
    """Each worker answers one tick."""

    answered = True

    async def execute_step(self, output: SchedulerOutput) -> RunnerOutput:
        self.answered = not self.answered
        if self.answered:
            raise WorkerDied(0, -9)
        return await super().execute_step(output)

    def discard(self, fault: EngineError) -> bool:
        return True

    async def recover(self) -> None:
        await anyio.lowlevel.checkpoint()


async def test_a_worker_that_has_answered_a_tick_is_replaced_at_once(waits: list[float]) -> None:
    async with AsyncDiffusionEngine(distributed_executor_backend=Mortal, costs_file=None) as engine:
        for _ in range(4):
            await engine.generate("a cat", num_inference_steps=1)
    assert waits == [0.0] * 3
