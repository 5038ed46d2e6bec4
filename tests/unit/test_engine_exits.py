"""``SystemExit`` and the like out of what an application gives an engine: a fault like others."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
from functools import partial
from typing import Any

import anyio
import pytest
from fakes import FakeExecutor

from steploom import AsyncDiffusionEngine, DiffusionEngine, EngineConfig, EngineDead, EngineError
from steploom.engine.asked import called, is_signals
from steploom.engine.observer import EngineObserver


def others() -> set[Any]:
    return asyncio.all_tasks() - {asyncio.current_task()}


def engine_of(kind: type[FakeExecutor]) -> AsyncDiffusionEngine:
    return AsyncDiffusionEngine(distributed_executor_backend=kind, costs_file=None)


async def exits_by_itself(*args: Any, **kwargs: Any) -> Any:
    raise SystemExit(3)


def exits_at_once(*args: Any) -> Any:
    raise SystemExit(3)


async def is_lost(*args: Any) -> Any:
    raise EngineError("gone")


def exiting(method: str, **more: Any) -> type[FakeExecutor]:
    return type("Exiting", (FakeExecutor,), {method: exits_by_itself, **more})


LOST = {"execute_step": is_lost}
EXITS = {
    "_init_executor": exiting("_init_executor"),
    "execute_step": exiting("execute_step"),
    "wait_failed": exiting("wait_failed"),
    "discard": type("Exiting", (FakeExecutor,), {"discard": exits_at_once, **LOST}),
    "recover": exiting("recover", discard=lambda *_: True, **LOST),
}


@pytest.mark.parametrize("method", EXITS)
async def test_an_executor_that_would_end_the_process_ends_the_engine(method: str) -> None:
    """In an application it would end whatever the event loop runs; and in a thread of its own, in silence."""
    engine = engine_of(EXITS[method])

    async def serve() -> None:
        await engine.start()
        await engine.generate("a cat")

    with pytest.raises(EngineDead, match=r"Exiting\.\w+\(\) raised SystemExit: 3"):
        await serve()
    assert isinstance(await engine.wait_ended(), EngineDead)
    assert not others()


async def test_what_an_executor_raises_that_is_told_of_a_loss_is_what_the_engine_died_of() -> None:
    def discard(self: Any, fault: EngineError) -> bool:
        raise ValueError("never heard of it")

    async with engine_of(type("Deaf", (FakeExecutor,), {"discard": discard, **LOST})) as engine:
        with pytest.raises(EngineDead, match=r"^ValueError: never heard of it"):
            await engine.generate("a cat")


@pytest.mark.parametrize("method", ["collective_rpc", "check_health"])
def test_a_call_that_would_end_the_process_fails_alone(method: str) -> None:
    with DiffusionEngine(distributed_executor_backend=exiting(method), costs_file=None) as engine:
        with pytest.raises(RuntimeError, match=r"raised SystemExit: 3"):
            getattr(engine, method)(*["x"] * (method == "collective_rpc"))
        assert engine.generate("a cat").images == ["a cat"]


def test_an_executor_that_exits_when_it_is_made_exits_the_caller_and_not_the_engines_own_loop() -> None:
    with pytest.raises(SystemExit):
        DiffusionEngine(distributed_executor_backend=type("Exiting", (FakeExecutor,), {"__init__": exits_at_once}))


@pytest.mark.parametrize("error", [RuntimeError("odd"), SystemExit(3)])
async def test_one_that_cannot_be_told_who_has_left_ends_the_engine_and_not_who_left(error: BaseException) -> None:
    class Mute(FakeExecutor):
        def amend(self, output: Any) -> None:
            raise error

    async with engine_of(Mute) as engine:
        executor = engine._core.executor
        executor.held = True
        async with engine.stream("a cat") as run:
            await executor.ticking()
            async with anyio.create_task_group() as group:
                group.start_soon(engine.pause)
                await anyio.wait_all_tasks_blocked()
                executor.release()
            assert await engine.abort(run.request_id)
        assert type(error).__name__ in str(await engine.wait_ended())


def test_an_observer_that_exits_is_told_nothing_more() -> None:
    class Observer(EngineObserver):
        def on_queued(self, request: Any) -> None:
            raise SystemExit(3)

    with DiffusionEngine(distributed_executor_backend=FakeExecutor, costs_file=None) as engine:
        engine._engine.observers.append(Observer())
        assert engine.generate("a cat").images == ["a cat"]
        assert not engine._engine.observers


def ends(number: int, frame: Any) -> None:
    signal.signal(number, signal.SIG_IGN)  # as one does that is ending
    sys.exit(number)


@pytest.mark.parametrize("handler", [ends, lambda *_: sys.exit(3), partial(ends), FakeExecutor])
def test_what_a_signals_handler_raises_is_the_process_s_own(handler: Any) -> None:
    class Interrupted(FakeExecutor):
        def on_signal(self, number: int, frame: Any) -> None:
            raise SystemExit

        def work(self) -> None:
            signal.raise_signal(signal.SIGUSR1)

    executor = Interrupted(EngineConfig())
    before = signal.signal(signal.SIGUSR1, executor.on_signal if handler is FakeExecutor else handler)
    try:
        with pytest.raises(SystemExit):
            called(executor.work)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_what_is_no_signals() -> None:
    told: list[bool] = []

    def work(error: BaseException) -> None:
        try:
            raise error
        except BaseException as caught:  # noqa: BLE001 - what is caught is what is asked about
            told.append(is_signals(caught))

    work(SystemExit(3))
    work(KeyboardInterrupt())
    thread = threading.Thread(target=work, args=(KeyboardInterrupt(),))
    thread.start()
    thread.join()
    assert told == [False, True, False]
