"""The blocking twin."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
from fakes import FakeExecutor, WholeFake, assert_empty

from steploom import (
    DiffusionEngine,
    DiffusionOutput,
    DiffusionRequest,
    EngineConfig,
    EngineDead,
    EngineError,
    EngineNotRunning,
    GenerationFailed,
    InvalidRequest,
    RequestCancelled,
    WorkerDied,
)

TESTS = Path(__file__).resolve().parents[1]


def blocking(kind: type[FakeExecutor] = FakeExecutor, **config: Any) -> DiffusionEngine:
    return DiffusionEngine(EngineConfig(distributed_executor_backend=kind, **config))


def test_step_answers_each_request_in_order_with_its_own_error() -> None:
    with blocking() as engine:
        requests = [DiffusionRequest(str(n), num_inference_steps=9 - n, seed=n) for n in range(5)]
        requests.insert(2, DiffusionRequest("bad", fail_at=1))
        requests.insert(4, DiffusionRequest("wrong", nonsense=1))
        outs = engine.step(requests)
    assert [out.request_id for out in outs] == [request.request_id for request in requests]
    assert isinstance(outs[2].error, GenerationFailed)
    assert "no such argument" in str(outs[4].error)
    assert [out.images for n, out in enumerate(outs) if n not in (2, 4)] == [[str(n)] for n in range(5)]


def test_step_takes_more_than_the_queue_does() -> None:
    with blocking(max_waiting=3, max_batch=2) as engine:
        outs = engine.step(DiffusionRequest(str(n)) for n in range(40))
    assert [out.images for out in outs] == [[str(n)] for n in range(40)]


@pytest.mark.parametrize(
    ("given", "named"),
    [(DiffusionRequest("a cat"), "requests=DiffusionRequest"), ("a cat", "requests='a cat'"), (None, "requests=None"),
     ([DiffusionRequest("a cat"), "a dog"], r"requests\[1\]='a dog'")],
)  # fmt: skip
def test_step_refuses_what_is_no_list_of_requests(given: Any, named: str) -> None:
    with blocking() as engine:
        with pytest.raises(InvalidRequest, match=named + r".*step\(\[DiffusionRequest\('a cat'\)\]\)") as caught:
            engine.step(given)
        assert caught.value.field == "requests"


def test_everything_of_the_asyncio_engine() -> None:
    with blocking() as engine:
        assert engine.generate("a cat", seed=1).seed == 1
        assert engine.info.pipeline_class == "FakePipeline"
        assert engine.collective_rpc("stats", timeout=60, unique_reply_rank=0) == "pong"
        assert engine.abort("unknown") is False
        engine.check_health()
        engine.sleep()
        with pytest.raises(EngineNotRunning, match="wake_up"):
            engine.generate("a cat")
        engine.wake_up()
    engine.close()
    with pytest.raises(EngineNotRunning, match="closed"):
        engine.generate("a cat")


def test_threads_share_one_engine() -> None:
    with blocking() as engine, ThreadPoolExecutor(8) as pool:
        outs = list(pool.map(lambda n: engine.generate(str(n), num_inference_steps=20), range(16)))
    assert [out.images for out in outs] == [[str(n)] for n in range(16)]


def test_abort_from_another_thread() -> None:
    with blocking() as engine, ThreadPoolExecutor(1) as pool:
        engine._engine._core.executor.held = True
        waiting = pool.submit(engine.generate, "a cat", request_id="mine")
        engine._thread.call(engine._engine._core.executor.ticking)
        assert engine.abort("mine") is True
        with pytest.raises(RequestCancelled):
            waiting.result()


def test_a_dead_engine_raises() -> None:
    with blocking() as engine:
        core = engine._engine._core
        core.executor.held = True

        async def die() -> None:
            await core.executor.ticking()
            core.executor.die(WorkerDied(0, 3))

        with ThreadPoolExecutor(1) as pool:
            pool.submit(engine._thread.call, die)
            with pytest.raises(WorkerDied):
                engine.step([DiffusionRequest("a cat"), DiffusionRequest("a dog")])
        with pytest.raises(EngineDead):
            engine.step([DiffusionRequest("a cat")])


def test_as_many_are_queued_as_the_new_model_takes() -> None:
    with blocking(max_waiting=64, max_batch=1, max_resident=1) as engine:
        engine.reload(max_waiting=4)
        for most in (4, 32):
            outputs = engine.step([DiffusionRequest("a cat", num_inference_steps=1) for _ in range(100)])
            assert not [output.error for output in outputs if output.error is not None]
            assert engine._limit.total_tokens == most
            engine.reload(max_waiting=32)


def test_so_it_is_when_it_is_replaced_meanwhile() -> None:
    with blocking(max_waiting=64, max_batch=1, max_resident=1) as engine, ThreadPoolExecutor(1) as pool:
        old = engine._engine._core.executor
        old.held = True
        step = pool.submit(engine.step, [DiffusionRequest("a cat", num_inference_steps=1) for _ in range(100)])
        engine._thread.call(old.ticking)

        async def reload() -> None:
            async with anyio.create_task_group() as group:
                group.start_soon(partial(engine._engine.reload, max_waiting=4))
                await anyio.wait_all_tasks_blocked()
                old.let_go()

        engine._thread.call(reload)
        assert not [output.error for output in step.result() if output.error is not None]


class Busy(WholeFake):
    """A remote that is too busy for ``"no"``."""

    async def execute_model(self, requests: list[DiffusionRequest]) -> list[DiffusionOutput]:
        if requests[0].prompt == "no":
            raise EngineError("the remote is busy")
        return [DiffusionOutput(request_id=requests[0].request_id, output="done")]


def test_a_remote_that_does_not_serve_one_request_leaves_the_others_their_outputs() -> None:
    with blocking(Busy) as engine:
        busy, done = engine.step([DiffusionRequest("no"), DiffusionRequest("yes")])
    assert type(busy.error) is EngineError
    assert done.output == "done"


class NoStart(FakeExecutor):
    async def start(self, on_progress: Any = None) -> Any:
        raise WorkerDied(0, 1)


def test_a_failed_start_leaves_no_thread() -> None:
    before = set(threading.enumerate())
    with pytest.raises(WorkerDied):
        blocking(NoStart)
    assert set(threading.enumerate()) == before


def test_an_exception_in_the_waiting_thread_aborts_its_requests_first() -> None:
    class Interrupted(BaseException):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupted

    with blocking() as engine:
        core = engine._engine._core
        core.executor.held = True
        before = signal.signal(signal.SIGUSR1, interrupt)
        main = threading.get_ident()

        async def fire() -> None:
            await core.executor.ticking()
            signal.pthread_kill(main, signal.SIGUSR1)

        try:
            with ThreadPoolExecutor(1) as pool:
                fired = pool.submit(engine._thread.call, fire)
                with pytest.raises(Interrupted):
                    engine.step([DiffusionRequest("a cat"), DiffusionRequest("a dog")])
                fired.result()
            assert core.scheduler.num_running == core.scheduler.num_waiting == 0
        finally:
            signal.signal(signal.SIGUSR1, before)
        _call(engine, core.executor.let_go)
        engine._thread.call(core.idled)
        assert_empty(engine._engine)


def _call(engine: DiffusionEngine, function: Any) -> None:
    async def run() -> None:
        await anyio.lowlevel.checkpoint()
        function()

    engine._thread.call(run)


def test_a_loop_that_cannot_be_made_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("asyncio.events.new_event_loop", full)
    with pytest.raises(OSError, match="Too many open files"):
        blocking()
    assert "steploom loop" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize("ending", ["pass", "del engine", "raise SystemExit(3)"])
def test_a_forgotten_engine_is_closed_with_the_interpreter(ending: str) -> None:
    script = f"""
        from fakes import FakeExecutor
        from steploom import DiffusionEngine

        class Telling(FakeExecutor):
            async def shutdown(self):
                print("shut down", flush=True)

        engine = DiffusionEngine(distributed_executor_backend=Telling)
        print(engine.generate("a cat").images, flush=True)
        {ending}
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=TESTS,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.split("\n") == ["['a cat']", "shut down", ""], done.stderr
    assert done.returncode == (3 if "3" in ending else 0)
    assert not done.stderr
