"""Pause and resume, drain, another model: who is refused, who goes on, who ends, whoever calls or leaves meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import anyio
import pytest
from fakes import FakeExecutor, WholeFake, assert_empty, fake_engine, settled
from interruption import at_every_await

from steploom import (
    AsyncDiffusionEngine,
    ConfigError,
    DeadlineExceeded,
    DiffusionEngine,
    EngineConfig,
    EngineDead,
    EngineError,
    EngineNotRunning,
    InvalidRequest,
    RequestCancelled,
    WorkerDied,
)
from steploom.executor.abstract import ProgressCallback
from steploom.protocol import PipelineInfo
from steploom.testing import FakeEngine


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
async def busy(kind: type[FakeExecutor] = FakeExecutor, names: str = "ab", **config: Any) -> Any:
    """An engine that runs some requests, whose first tick is held."""
    async with fake_engine(kind, **config) as (engine, executor), anyio.create_task_group() as group:
        executor.held = True
        asked = Outcomes(engine, group)
        await asked.ask(*names)
        yield engine, executor, group, asked


async def paused(engine: Any, executor: Any, group: Any) -> None:
    """Pauses while the tick is held."""
    group.start_soon(engine.pause)
    await anyio.wait_all_tasks_blocked()
    executor.let_go()
    await anyio.wait_all_tasks_blocked()
    assert engine.paused


async def test_while_paused_nothing_runs_and_who_comes_waits() -> None:
    async with busy(max_batch=2, max_resident=2) as (engine, executor, group, asked):
        returned = []

        async def pause() -> None:
            await engine.pause()
            returned.append(len(executor.log))

        group.start_soon(pause)
        await anyio.wait_all_tasks_blocked()
        assert not returned, "a tick is under way"
        executor.let_go()
        await anyio.wait_all_tasks_blocked()
        assert returned == [len(executor.log)] == [1]
        await asked.ask("c")
        assert len(executor.log) == 1
        assert (engine.num_running, engine.num_waiting) == (2, 1)
        assert [steps for _, steps in executor.resident.values()] == [1, 1]
        await engine.check_health()
        await engine.pause()
        await engine.resume()
        await engine.resume()
        assert not engine.paused
    assert asked.done == ["a", "b", "c"]
    assert len([new for output in executor.log for new in output.scheduled_new_reqs]) == 3


async def test_while_paused_requests_end_by_their_timeout_by_abort_and_with_their_reader() -> None:
    async with fake_engine() as (engine, executor), anyio.create_task_group() as group:
        executor.held = True
        asked = Outcomes(engine, group)
        await asked.ask("late", "late too", timeout=0.5)
        await asked.ask("aborted", "stays")
        await paused(engine, executor, group)
        assert (engine.num_running, engine.num_waiting) == (2, 2)
        await asked.ask("later", timeout=0.001)
        with anyio.CancelScope() as scope:
            async with engine.stream("left", request_id="left"):
                scope.cancel()
                await anyio.lowlevel.checkpoint()
        assert await engine.abort("aborted")
        for name in ("late", "late too", "later"):
            assert isinstance(await asked.told(name), DeadlineExceeded)
        assert isinstance(await asked.told("aborted"), RequestCancelled)
        assert (engine.num_running, engine.num_waiting) == (0, 1)
        await engine.resume()
    assert asked.done == ["stays"]


async def test_of_two_that_pause_one_may_leave() -> None:
    async with busy() as (engine, executor, group, asked):
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as first:
                first.start_soon(engine.pause)
                group.start_soon(engine.pause)
                await anyio.wait_all_tasks_blocked()
                scope.cancel()
        assert engine.paused
        executor.let_go()
        await anyio.wait_all_tasks_blocked()
        assert engine.paused
        assert len(executor.log) == 1
        await engine.resume()
    assert asked.done == ["a", "b"]


async def test_a_pause_that_is_cancelled_was_none() -> None:
    async with busy() as (engine, executor, _, asked):
        with anyio.move_on_after(0):
            await engine.pause()
        assert not engine.paused
        executor.let_go()
    assert asked.done == ["a", "b"]


async def test_resumed_while_it_waits_a_pause_returns() -> None:
    async with busy() as (engine, executor, group, asked):
        group.start_soon(engine.pause)
        await anyio.wait_all_tasks_blocked()
        await engine.resume()
        await anyio.wait_all_tasks_blocked()
        executor.let_go()
    assert asked.done == ["a", "b"]
    assert not engine.paused


async def test_whole_requests_cannot_pause() -> None:
    async with fake_engine(WholeFake) as (engine, _):
        with pytest.raises(EngineError, match="WholeFake executes whole requests"):
            await engine.pause()
        assert not engine.paused


@pytest.mark.parametrize("what", ["sleep", "reload"])
async def test_what_would_wait_for_ever_while_paused_is_refused(what: str) -> None:
    async with fake_engine() as (engine, _):
        await engine.pause()
        with pytest.raises(EngineError, match="resume"):
            await getattr(engine, what)()
        await engine.resume()
        assert (await engine.generate("a cat")).images == ["a cat"]


@pytest.mark.parametrize("what", ["pause", "drain", "reload"])
@pytest.mark.parametrize("end", ["close", "die"])
async def test_an_engine_that_ends_meanwhile_says_so(what: str, end: str) -> None:
    async with busy() as (engine, executor, group, asked):
        errors: list[Exception] = []

        async def call() -> None:
            try:
                await getattr(engine, what)()
            except EngineError as error:
                errors.append(error)

        group.start_soon(call)
        await anyio.wait_all_tasks_blocked()
        if what == "reload":
            assert engine._core.executor is not executor
        if end == "close":
            await engine.close()
        else:
            engine._core.executor.die(WorkerDied(0, -9))
        executor.let_go()
        await anyio.wait_all_tasks_blocked()
        # What ran when the model was replaced ends with the old one, whatever becomes of the new one.
        kinds = {"close": EngineNotRunning, "die": EngineDead}
        assert [type(error) for error in errors] == ([] if what == "reload" else [kinds[end]])
        assert {type(outcome) for outcome in asked.of.values()} == {
            RequestCancelled if end == "close" else WorkerDied
        } or (what, end, asked.done) == ("reload", "die", ["a", "b"])
        await engine.close()
    assert asyncio.all_tasks() == {asyncio.current_task()}
    async with engine:  # what held of the one before holds of it no more
        assert (engine.paused, engine.draining) == (False, False)
        await engine.generate("a cat")


async def test_drain_refuses_the_new_and_lets_the_others_end() -> None:
    async with busy(max_batch=1, max_resident=1) as (engine, executor, group, asked):
        ended: list[int] = []

        async def drain(timeout_s: float | None) -> None:
            ended.append(await engine.drain(timeout_s))

        group.start_soon(drain, None)
        group.start_soon(drain, 1000.0)
        await anyio.wait_all_tasks_blocked()
        assert engine.draining
        for call in (engine.generate("new"), engine.reload()):
            with pytest.raises(EngineNotRunning, match=r"drains.*resume"):
                await call
        assert not ended
        executor.let_go()
        await anyio.wait_all_tasks_blocked()
        assert ended == [0, 0]
        assert asked.done == ["a", "b"]
        with pytest.raises(EngineNotRunning, match="drains"):
            await engine.generate("new")
        assert await engine.drain() == 0
        await engine.resume()
        assert (await engine.generate("new")).images == ["new"]


@pytest.mark.parametrize("limit", [0, 0.01])
async def test_what_has_not_ended_in_time_is_ended(limit: float) -> None:
    async with busy(max_batch=1, max_resident=1) as (engine, executor, _, asked):
        assert await engine.drain(limit) == 2
        await anyio.wait_all_tasks_blocked()
        for outcome in asked.of.values():
            assert isinstance(outcome, RequestCancelled)
            assert f"timeout_s={limit}" in str(outcome)
        executor.let_go()
        await engine.resume()
        await engine.generate("new")


async def test_a_drain_lets_a_paused_engine_go_on_and_a_pause_meanwhile_counts() -> None:
    async with busy() as (engine, executor, group, asked):
        await paused(engine, executor, group)
        executor.held = True
        group.start_soon(engine.drain)
        await executor.ticking()
        assert (engine.paused, engine.draining) == (False, True)
        await paused(engine, executor, group)
        assert not asked.of
        await engine.resume()
        await anyio.wait_all_tasks_blocked()
        assert asked.done == ["a", "b"]
        assert not engine.draining, "resumed before it was drained"


async def test_a_drain_that_is_cancelled_was_none_unless_another_one_goes_on() -> None:
    async with busy() as (engine, executor, group, asked):
        with anyio.move_on_after(0):
            await engine.drain()
        assert not engine.draining
        group.start_soon(engine.drain)
        await anyio.wait_all_tasks_blocked()
        with anyio.move_on_after(0):
            await engine.drain()
        assert engine.draining
        executor.let_go()
        await anyio.wait_all_tasks_blocked()
        assert engine.draining
        assert asked.done == ["a", "b"]


@pytest.mark.parametrize("limit", [-1, float("nan"), True, "1"])
async def test_a_limit_that_is_none_is_refused(limit: Any) -> None:
    async with fake_engine() as (engine, _):
        with pytest.raises(ConfigError, match="timeout_s="):
            await engine.drain(limit)
        assert not engine.draining


@pytest.mark.parametrize("what", ["pause", "drain", "reload"])
async def test_cancelled_at_every_await(what: str) -> None:
    async with fake_engine() as (engine, _):

        async def call() -> None:
            async with anyio.create_task_group() as group:
                group.start_soon(engine.generate, "a cat")
                await anyio.lowlevel.checkpoint()
                await getattr(engine, what)()
                await engine.resume()

        async def after() -> None:
            await engine.resume()  # Cancelled behind its last await it had succeeded.
            assert (engine.paused, engine.draining) == (False, False)
            assert (await engine.generate("a dog")).images == ["a dog"]
            for core in engine._operations.cores[:-1]:
                await core.ended.wait()
            await settled(engine)
            assert_empty(engine)
            await anyio.wait_all_tasks_blocked()
            assert len(asyncio.all_tasks()) == len(before)
            assert not engine._operations.reloading
            assert len(engine._operations.cores) == 1

        before = asyncio.all_tasks()
        assert await at_every_await(call, after) >= 2


def prompts(executor: FakeExecutor) -> list[str]:
    """Whom it was given, in order."""
    return [new.request.prompt for output in executor.log for new in output.scheduled_new_reqs]


async def test_those_that_wait_are_the_new_models_and_the_others_end_with_the_old_one() -> None:
    async with busy(names="abcdef", max_batch=2, max_resident=2) as (engine, old, group, asked):
        await asked.ask("late", timeout=0.02)
        returned = anyio.Event()

        async def reload() -> None:
            await engine.reload(max_batch=1, max_resident=1, max_steps=7)
            returned.set()

        before = engine.info
        group.start_soon(reload)
        await anyio.wait_all_tasks_blocked()
        new = engine._core.executor
        assert new is not old
        assert engine.info is not before
        assert (engine.config.max_batch, new.config.max_batch) == (1, 1)
        assert not returned.is_set()
        assert not old.shut
        assert asked.done == ["c", "d", "e", "f", "late"] == sorted(prompts(new))
        assert prompts(new) == ["c", "d", "e", "f", "late"], "in the order of their arrival"
        assert new.max_resident == 1
        with pytest.raises(InvalidRequest, match="a live request has this id"):
            await engine.generate("another", request_id="a")
        with pytest.raises(EngineError, match="under way"):
            await engine.reload()
        with pytest.raises(EngineError, match="under way"):
            await engine.sleep()
        assert engine.num_running == 2
        assert await engine.abort("a")
        assert isinstance(await asked.told("a"), RequestCancelled)
        old.let_go()
        await returned.wait()
        assert old.shut == 1
        assert prompts(old) == ["a", "b"]
        assert "b" in asked.done
        await engine.generate("g")
        assert prompts(new)[-1] == "g"
    assert engine._operations.cores == [engine._core]


async def test_whom_a_new_model_inherits_keeps_its_clock() -> None:
    async with busy(names="a", max_batch=1, max_resident=1) as (engine, old, group, asked):
        await asked.ask("b", timeout=1000)
        live, loop = engine._core.live, asyncio.get_running_loop()
        live.borrowed["b"].accepted -= 400  # as if it had waited so long
        live.timers.pop("b").cancel()
        live.timers["b"] = loop.call_later(600, asked.of.__setitem__, "b", "the old model's timer was left")
        left = live.timers["b"]
        engine._make_executor = held
        group.start_soon(engine.reload)
        await anyio.wait_all_tasks_blocked()
        new = engine._core.executor
        assert prompts(new) == ["b"]
        assert left.cancelled()
        assert 500 < engine._core.live.timers["b"].when() - loop.time() <= 600
        new.let_go()
        old.let_go()
        assert 400 <= (await asked.told("b")).timings.queued_s < 500


async def test_who_does_not_fit_the_new_model_fails_alone() -> None:
    async with busy(names="a", max_batch=1, max_resident=1) as (engine, old, group, asked):
        await asked.ask("long", num_inference_steps=9)
        await asked.ask("short", num_inference_steps=2)
        group.start_soon(lambda: engine.reload(max_steps=5))
        await anyio.wait_all_tasks_blocked()
        old.let_go()
    assert isinstance(asked.of["long"], InvalidRequest)
    assert "at most 5" in str(asked.of["long"])
    assert asked.done == ["a", "short"]


async def test_whose_reader_leaves_is_taken_from_the_new_model_too() -> None:
    async with busy(names="a", max_batch=1, max_resident=1) as (engine, old, group, asked):
        async with engine.stream("left"):
            old.release()
            engine._make_executor = held
            group.start_soon(engine.reload)
            await anyio.wait_all_tasks_blocked()
            new = engine._core.executor
            assert prompts(new) == ["left"]
        assert engine._core.scheduler.num_running == 0
        new.let_go()
        old.let_go()
    assert asked.done == ["a"]


def held(config: EngineConfig, pipeline: Any = None) -> FakeExecutor:
    made = FakeExecutor(config)
    made.held = True
    return made


class BrokenStart(FakeExecutor):
    async def _init_executor(self, on_progress: ProgressCallback) -> PipelineInfo:
        await anyio.lowlevel.checkpoint()
        raise WorkerDied(0, 1, "no such weights")


class SlowStart(FakeExecutor):
    """Loads until it is told that it has."""

    async def _init_executor(self, on_progress: ProgressCallback) -> PipelineInfo:
        self.loaded = anyio.Event()
        await self.loaded.wait()
        return await super()._init_executor(on_progress)


async def test_a_model_that_cannot_be_loaded_leaves_everything_as_it_was() -> None:
    async with busy(max_batch=1, max_resident=1) as (engine, executor, _, asked):
        was = (engine.config, engine.info, engine._core)
        with pytest.raises(WorkerDied, match="no such weights"):
            await engine.reload(distributed_executor_backend=BrokenStart, max_steps=7)
        for wrong in ({"max_batch": 0}, {"no_such_field": 1}, {"distributed_executor_backend": "no.such"}):
            with pytest.raises(ConfigError):
                await engine.reload(**wrong)
        assert (engine.config, engine.info, engine._core) == was
        executor.let_go()
        await anyio.wait_all_tasks_blocked()
        assert asked.done == ["a", "b"]
        await engine.reload()


async def test_the_old_model_serves_while_the_new_one_is_loaded() -> None:
    async with fake_engine() as (engine, old), anyio.create_task_group() as group:
        group.start_soon(lambda: engine.reload(distributed_executor_backend=SlowStart))
        await anyio.wait_all_tasks_blocked()
        (incoming,) = [core for core in engine._operations.cores if core.executor is not old]
        assert (await engine.generate("meanwhile")).images == ["meanwhile"]
        await engine.pause()
        await engine.resume()
        group.start_soon(engine.drain)
        await anyio.wait_all_tasks_blocked()
        incoming.executor.loaded.set()
        await anyio.wait_all_tasks_blocked()
        assert engine._core is incoming
        with pytest.raises(EngineNotRunning, match="drains"):
            await engine.generate("late")
        await engine.resume()
        await engine.generate("new")
    assert prompts(old) == ["meanwhile"]


@pytest.mark.parametrize("how", ["close", "cancel", "die"])
async def test_what_comes_while_the_new_model_is_loaded_ends_it(how: str) -> None:
    made: list[Any] = []
    async with fake_engine() as (engine, old):
        errors: list[BaseException] = []

        async def reload() -> None:
            try:
                await engine.reload(distributed_executor_backend=SlowStart)
            except BaseException as error:
                errors.append(error)
                raise

        with contextlib.suppress(BaseExceptionGroup):
            async with anyio.create_task_group() as group:
                group.start_soon(reload)
                await anyio.wait_all_tasks_blocked()
                made += [core for core in engine._operations.cores if core.executor is not old]
                if how == "close":
                    await engine.close()
                elif how == "cancel":
                    group.cancel_scope.cancel()
                else:
                    old.die(WorkerDied(0, -9))
                    await anyio.wait_all_tasks_blocked()
                    made[0].executor.loaded.set()
        kind = {"close": EngineNotRunning, "cancel": asyncio.CancelledError, "die": EngineDead}[how]
        assert [type(error) for error in errors] == [kind]
        assert made[0].executor.shut == 1
        assert made[0].ended.is_set()
        if how == "cancel":
            await engine.generate("as before")


async def test_the_end_of_the_old_model_is_not_the_engines() -> None:
    async with fake_engine() as (engine, _), anyio.create_task_group() as group:
        ends: list[Any] = []

        async def wait() -> None:
            ends.append(await engine.wait_ended())

        group.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        await engine.reload()
        await anyio.wait_all_tasks_blocked()
        assert not ends
        engine._core.executor.die(WorkerDied(0, -9))
        await anyio.wait_all_tasks_blocked()
        assert [type(end) for end in ends] == [WorkerDied]


async def test_a_given_pipeline_cannot_be_loaded_anew() -> None:
    engine = AsyncDiffusionEngine.from_pipeline(object())
    engine._make_executor = _without_pipeline
    async with engine:
        with pytest.raises(ConfigError, match="from_pipeline"):
            await engine.reload(model="demo")


def _without_pipeline(config: EngineConfig, pipeline: Any = None) -> FakeExecutor:
    return FakeExecutor(config)


def test_the_blocking_twin_has_them_too() -> None:
    with DiffusionEngine(distributed_executor_backend=FakeExecutor) as engine:
        engine.pause()
        engine.resume()
        assert engine.drain(1.0) == 0
        with pytest.raises(EngineNotRunning, match="drains"):
            engine.generate("a cat")
        engine.resume()
        engine.reload(max_batch=3)
        assert engine.config.max_batch == 3
        assert engine.generate("a cat").images == ["a cat"]


async def test_the_pretended_engine_has_them_too() -> None:
    async with FakeEngine() as engine:
        await engine.pause()
        await engine.resume()
        await engine.reload(max_batch=3)
        assert await engine.drain() == 0
        await engine.resume()
        assert (await engine.generate("a cat", height=64, width=64)).images
