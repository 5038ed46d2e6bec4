"""Applications that are killed, interrupted or forget to close: their worker goes with them, and nothing is left."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from processes import content, gone
from scripted_runner import Gate

from steploom.executor.process import _import_path

pytestmark = pytest.mark.usefixtures("temporary")

TESTS = Path(__file__).parents[1]


SCRIPT = """
import asyncio, os, sys
sys.path.insert(0, {tests!r})
from steploom.config import EngineConfig
from steploom.executor import MultiprocExecutor
from steploom.protocol import SchedulerOutput

class Scripted(MultiprocExecutor):
    runner = "scripted_runner:make"

async def main():
    executor = Scripted(EngineConfig())
    try:
        await executor.start()
        print(await executor.collective_rpc("pid", unique_reply_rank=0), flush=True)
        await executor.execute_step(SchedulerOutput(1, batch_key={script!r}))
        await executor.wait_failed()
    finally:
        await executor.shutdown()
        print("closed", flush=True)

{run}
"""
"""An application without a main guard."""


@contextlib.contextmanager
def application(
    script: str = "", run: str = "asyncio.run(main())"
) -> Iterator[tuple[subprocess.Popen[str], psutil.Process]]:
    """A running application and its worker."""
    code = SCRIPT.format(tests=str(TESTS), script=script or None, run=run)
    app = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert app.stdout is not None
    try:
        yield app, psutil.Process(int(app.stdout.readline()))
    finally:
        app.kill()
        app.wait()
        app.stdout.close()


@pytest.mark.parametrize("busy", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["idle", "in a tick"])
async def test_a_killed_application_takes_its_worker_along(temporary: Path, gate: Gate, busy: bool) -> None:
    script = f"hold {gate.path}" if busy else ""
    with application(script) as (app, worker):
        if busy:
            await gate.reached()
        app.kill()
        await gone(worker)
        assert content(temporary) == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process that is stopped stays until it is continued")
async def test_so_it_does_with_one_that_is_stopped(temporary: Path) -> None:
    with application() as (app, worker):
        worker.suspend()
        app.kill()
        await gone(worker)
        assert content(temporary) == []


@pytest.mark.slow
@pytest.mark.parametrize("run", ["asyncio.run(main())", "import uvloop; uvloop.run(main())"], ids=["asyncio", "uvloop"])
async def test_ctrl_c_ends_everything_in_order(temporary: Path, run: str) -> None:
    with application(run=run) as (app, worker):
        app.send_signal(signal.SIGINT)
        assert app.stdout is not None
        assert app.stdout.read() == "closed\n"
        app.wait(60)
        assert not worker.is_running()
        assert content(temporary) == []


@pytest.mark.slow
async def test_an_application_that_forgets_to_close_leaves_nothing(temporary: Path) -> None:
    run = "loop = asyncio.new_event_loop(); loop.create_task(main()); loop.call_later(1e9, print)\n" + (
        "import threading, signal\nsignal.signal(signal.SIGTERM, lambda *a: loop.stop())\n"
        "loop.add_signal_handler(signal.SIGTERM, loop.stop)\nloop.run_forever()\nos._exit(0)"
    )
    with application(run=run) as (app, worker):
        app.terminate()
        app.wait(60)
        await gone(worker)
        assert content(temporary) == []


@pytest.mark.slow
async def test_what_python_does_not_look_at_in_its_import_path_stops_no_worker(temporary: Path) -> None:
    run = "import pathlib\nsys.path[:0] = [pathlib.Path('no text'), '']\nasyncio.run(main())"
    with application(run=run) as (app, worker):
        app.kill()
        await gone(worker)
        assert content(temporary) == []


def test_a_working_directory_that_is_gone_is_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", ["", Path("no text"), "here", b"bytes"])
    here = tmp_path / "folder"
    here.mkdir()
    monkeypatch.chdir(here)
    assert _import_path() == [str(here), "here"]
    here.rmdir()
    assert _import_path() == ["here"]


@pytest.mark.slow
def test_threads_that_go_on_when_the_main_one_has_ended_are_served() -> None:
    """Python joins them as it ends; pools of its own take no work any more by then."""
    code = """
import asyncio, threading
from steploom import AsyncDiffusionEngine

async def main():
    async with AsyncDiffusionEngine(model="demo") as engine:
        out = await engine.generate("a red circle", num_inference_steps=2)
        print(out.images[0].size)

def work():
    main_thread.join()
    asyncio.run(main())

main_thread = threading.main_thread()
threading.Thread(target=work).start()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert done.stdout == "(64, 64)\n", done.stderr
