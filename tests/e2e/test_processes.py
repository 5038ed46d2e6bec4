"""Worker processes that die, scripts that are interrupted: nothing hangs, nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest
import torch

from steploom import AsyncDiffusionEngine, Restarted, StepEvent

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def workers(process: psutil.Process) -> list[psutil.Process]:
    return [child for child in process.children(recursive=True) if "steploom.worker" in " ".join(child.cmdline())]


async def test_sixteen_requests_outlive_the_only_worker_with_equal_pictures(tiny_model: Path) -> None:
    """Within one grey level of the undisturbed ones; another seed's are far from it."""
    params: dict[str, Any] = {"num_inference_steps": 6, "height": 32, "width": 32, "output_type": "np"}
    pictures: dict[int, Any] = {}
    restarted: list[int] = []

    async def one(seed: int, begun: anyio.Event) -> None:
        async with engine.stream("a cat", seed=seed, **params) as run:
            async for event in run:
                if isinstance(event, StepEvent):
                    begun.set()
                if isinstance(event, Restarted):
                    restarted.append(seed)
            pictures[seed] = (await run.result()).images[0]

    async with AsyncDiffusionEngine(model=str(tiny_model), torch_threads=1) as engine:
        undisturbed = [(await engine.generate("a cat", seed=seed, **params)).images[0] for seed in range(16)]
        [worker] = workers(psutil.Process())[-1:]
        async with anyio.create_task_group() as group:
            begun = anyio.Event()
            for seed in range(16):
                group.start_soon(one, seed, begun)
            await begun.wait()
            worker.kill()
        assert engine.recovering is None
    assert set(restarted) == set(range(16))
    assert abs(undisturbed[0] - undisturbed[1]).max() > 20 / 255
    for seed in range(16):
        assert abs(pictures[seed] - undisturbed[seed]).max() <= 1 / 255


async def test_with_batch_invariant_a_replay_has_the_bits_of_the_undisturbed_run() -> None:
    """Those that each has by itself, although the worker dies while they share its forwards."""
    params: dict[str, Any] = {"num_inference_steps": 6, "height": 64, "width": 64, "output_type": "latent"}
    latents: dict[int, Any] = {}
    restarted: set[int] = set()

    async def one(seed: int, begun: anyio.Event) -> None:
        async with engine.stream("a large red circle", seed=seed, **params) as run:
            async for event in run:
                if isinstance(event, StepEvent) and event.step >= 3 and event.batch_requests > 1:
                    begun.set()
                if isinstance(event, Restarted):
                    restarted.add(seed)
            latents[seed] = (await run.result()).images

    async with AsyncDiffusionEngine(
        model="demo", torch_threads=1, costs_file=None, batch_invariant=True, max_batch=4
    ) as engine:
        undisturbed = [(await engine.generate("a large red circle", seed=seed, **params)).images for seed in range(6)]
        [worker] = workers(psutil.Process())[-1:]
        async with anyio.create_task_group() as group:
            begun = anyio.Event()
            for seed in range(6):
                group.start_soon(one, seed, begun)
            await begun.wait()
            worker.kill()
    assert restarted
    for seed in range(6):
        assert torch.equal(latents[seed], undisturbed[seed])
    assert not torch.equal(undisturbed[0], undisturbed[1])


async def test_two_workers_give_the_pictures_that_one_gives(tiny_model: Path) -> None:
    """Those of ``pipe(...)`` alone, within one grey level, whichever worker a request lived with."""
    from diffusers import DiffusionPipeline

    params: dict[str, Any] = {"num_inference_steps": 6, "height": 32, "width": 32, "output_type": "np"}
    pipe = DiffusionPipeline.from_pretrained(str(tiny_model))
    pipe.set_progress_bar_config(disable=True)
    alone = [pipe("a cat", generator=torch.Generator().manual_seed(i), **params).images[0] for i in range(12)]
    pictures: dict[int, Any] = {}

    async def one(seed: int) -> None:
        pictures[seed] = (await engine.generate("a cat", seed=seed, **params)).images[0]

    async with AsyncDiffusionEngine(model=str(tiny_model), torch_threads=1, data_parallel_size=2) as engine:
        async with anyio.create_task_group() as group:
            for seed in range(12):
                group.start_soon(one, seed)
        stats: list[Any] = await engine.collective_rpc("stats")
    assert all(one.ticks >= 6 for one in stats), "both had some"
    assert abs(alone[0] - alone[1]).max() > 20 / 255
    for seed in range(12):
        assert abs(pictures[seed] - alone[seed]).max() <= 1 / 255


SCRIPT = """
import sys
from steploom import DiffusionEngine, DiffusionRequest

with DiffusionEngine(model=sys.argv[1], torch_threads=1) as engine:
    try:
        print("started", flush=True)
        engine.step([DiffusionRequest("a cat", num_inference_steps=900) for _ in range(4)])
    except KeyboardInterrupt:
        # A call is answered before the next tick, and only that one tells the worker: so let a tick pass.
        engine.step([DiffusionRequest("a dog", num_inference_steps=1)])
        print("resident:", engine.collective_rpc("stats", unique_reply_rank=0).resident, flush=True)
        raise
"""


def test_ctrl_c_aborts_the_requests_and_closes_cleanly(tiny_model: Path) -> None:
    """A script without a main guard, over a worker process that gets the same signal, as from a terminal."""
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tiny_model)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, start_new_session=True, **pipes) as script:
        assert script.stdout is not None
        assert script.stdout.readline() == "started\n"
        family = [psutil.Process(script.pid), *workers(psutil.Process(script.pid))]
        assert len(family) == 2
        for process in family:
            process.send_signal(signal.SIGINT)
        said, complaints = script.communicate(timeout=120)
    assert said == "resident: 0\n"
    assert "KeyboardInterrupt" in complaints
    assert script.returncode in (1, 130, -signal.SIGINT)
    gone, alive = psutil.wait_procs(family, timeout=60)
    assert not alive
    assert len(gone) == 2


TWICE = """
import asyncio, sys
from steploom import AsyncDiffusionEngine

async def main():
    async with AsyncDiffusionEngine(model=sys.argv[1], torch_threads=1) as engine:
        print("started", flush=True)
        await asyncio.gather(*(engine.generate("a cat", num_inference_steps=900) for _ in range(3)))

asyncio.run(main())
"""


def test_a_second_ctrl_c_ends_it_at_once(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """asyncio.run cancels every task then, the one that closes the engine too."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    app = subprocess.Popen([sys.executable, "-c", TWICE, str(tiny_model)], stdout=subprocess.PIPE, text=True)
    assert app.stdout is not None
    assert app.stdout.readline() == "started\n"
    (worker,) = workers(psutil.Process(app.pid))
    app.send_signal(signal.SIGINT)
    app.send_signal(signal.SIGINT)
    assert app.wait(timeout=60) != 0
    worker.wait(timeout=60)
    app.stdout.close()
    assert not list(tmp_path.glob("steploom-*"))


FIRST = """
import asyncio, sys, time
from steploom import AsyncDiffusionEngine

async def main():
    async with AsyncDiffusionEngine(model=sys.argv[1], torch_threads=1) as engine:
        loaded = set(sys.modules)
        params = {"num_inference_steps": 2, "latents_every": 1, "return_trajectory": True, "height": 32, "width": 32}
        await asyncio.gather(*(engine.generate("a cat", **params) for _ in range(4)))
        print(sorted({name.partition(".")[0] for name in set(sys.modules) - loaded} & {"torch", "numpy", "PIL"}))

asyncio.run(main())
"""


def test_the_first_tensors_import_nothing_while_people_are_served(tiny_model: Path) -> None:
    """An import holds Python's lock: in a fresh interpreter the first latents used to stop the loop for a second."""
    done = subprocess.run([sys.executable, "-c", FIRST, str(tiny_model)], stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout == "[]\n"


RECOVERING = """
import asyncio, sys
from steploom import AsyncDiffusionEngine, EngineObserver

class Told(EngineObserver):
    def on_fault(self, fault):
        print("lost", flush=True)

async def main():
    async with AsyncDiffusionEngine(model=sys.argv[1], torch_threads=1) as engine:
        engine.observers.append(Told())
        print("started", flush=True)
        await asyncio.gather(*(engine.generate("a cat", num_inference_steps=900) for _ in range(3)))

asyncio.run(main())
"""


@pytest.mark.parametrize("which", ["the application", "everybody, as from a terminal"])
def test_ctrl_c_while_a_worker_is_replaced(tiny_model: Path, which: str) -> None:
    """The replacement is being loaded: it is given up, and nothing of it is left."""
    command = [sys.executable, "-c", RECOVERING, str(tiny_model)]
    with subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, text=True) as app:
        assert app.stdout is not None
        assert app.stdout.readline() == "started\n"
        (worker,) = workers(psutil.Process(app.pid))
        worker.kill()
        assert app.stdout.readline() == "lost\n"
        if which == "the application":
            app.send_signal(signal.SIGINT)
        else:
            os.killpg(app.pid, signal.SIGINT)
        assert app.wait(timeout=60) in (1, 130, -signal.SIGINT)
    assert not [one for one in psutil.process_iter() if _session(one.pid) == app.pid]


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None
