"""The ends of blocking engines that nobody closes: collected, forgotten, forked, or closed in their own loop."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
import threading
import weakref
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from fakes import FakeExecutor

from steploom import DiffusionEngine, EngineConfig, EngineError, EngineNotRunning
from steploom.engine.loop_thread import LoopThread

TESTS = Path(__file__).resolve().parents[1]


def blocking(kind: type[FakeExecutor] = FakeExecutor) -> DiffusionEngine:
    return DiffusionEngine(EngineConfig(distributed_executor_backend=kind))


class Stop(FakeExecutor):
    """Tells when it is ended, and waits for leave to do so."""

    begun, leave = threading.Event(), threading.Event()

    async def shutdown(self) -> None:
        self.begun.set()
        await anyio.to_thread.run_sync(self.leave.wait)


def forgotten() -> tuple[weakref.ref[Any], LoopThread]:
    """An engine in a cycle, which nothing but the collector can free."""
    engine = blocking(Stop)
    engine.me = engine
    return weakref.ref(engine), engine._thread


async def collect() -> None:
    gc.collect()


@pytest.mark.parametrize("where", ["its own loop", "another engine's loop", "a thread"])
def test_a_forgotten_engine_ends_wherever_it_is_collected_and_holds_nobody_up(where: str) -> None:
    Stop.begun.clear()
    Stop.leave.clear()
    with blocking() as other:
        gc.disable()
        try:
            gone, thread = forgotten()
            if where == "a thread":
                gc.collect()
            else:
                (thread if "own" in where else other._thread)._portal.call(collect)
            assert gone() is None
        finally:
            gc.enable()
        assert Stop.begun.wait(20)
        assert thread._thread.is_alive(), "nobody has waited for it"
        Stop.leave.set()
        thread.join()
        assert other.generate("a cat").images == ["a cat"]


def test_the_interpreter_waits_for_one_that_was_collected_just_now() -> None:
    said = run_script("""
        import anyio
        from fakes import FakeExecutor
        from steploom import DiffusionEngine

        class Telling(FakeExecutor):
            async def shutdown(self):
                for _ in range(2000):
                    await anyio.lowlevel.checkpoint()
                print("shut down", flush=True)

        engine = DiffusionEngine(distributed_executor_backend=Telling)
        del engine
        print("over", flush=True)
    """)
    assert said == ["over", "shut down"]


def test_in_its_own_loop_a_call_is_refused_and_close_does_not_wait() -> None:
    engine = blocking()

    async def call() -> None:
        with pytest.raises(EngineError, match=r"own event loop.*another thread"):
            engine.generate("a cat")
        engine.close()

    engine._thread._portal.call(call)
    engine._thread.join()
    with pytest.raises(EngineNotRunning, match="closed"):
        engine.generate("a cat")


def test_a_fork_that_ends_leaves_the_engine_alone_and_is_told_that_it_is_not_its_own() -> None:
    said = run_script("""
        import gc, os, sys
        from fakes import FakeExecutor
        from steploom import DiffusionEngine, EngineNotRunning

        class Telling(FakeExecutor):
            async def shutdown(self):
                print("shut down by", "the child" if os.getpid() != parent else "the parent", flush=True)

        parent = os.getpid()
        engine = DiffusionEngine(distributed_executor_backend=Telling)
        child = os.fork()
        if child == 0:
            try:
                engine.generate("a cat")
            except EngineNotRunning as error:
                print(f"process {parent}" in str(error), "make an engine here" in str(error), flush=True)
            engine.close()
            with DiffusionEngine(distributed_executor_backend=FakeExecutor) as own:
                print(own.generate("a dog").images, flush=True)
            del engine
            gc.collect()
            sys.exit(5)
        print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        print(engine.generate("a cat").images, flush=True)
    """)
    assert said == ["True True", "['a dog']", "child 5", "['a cat']", "shut down by the parent"]


def run_script(script: str) -> list[str]:
    """The lines that it prints, if all goes well."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=TESTS,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert not done.stderr
    return done.stdout.splitlines()
