"""An application whose threads all wait for the engine: what the engine runs in threads needs no place among them."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anyio
import pytest
from anyio import from_thread, to_thread
from mortal_site import Site, expected
from PIL import Image
from scripted_runner import Gate

from steploom import AsyncDiffusionEngine, web

pytestmark = pytest.mark.usefixtures("temporary")


@contextlib.asynccontextmanager
async def full_pools() -> AsyncIterator[None]:
    """The application holds every place of the loop's two pools, until it has what it waits for."""
    answered, loop = threading.Event(), asyncio.get_running_loop()
    to_thread.current_default_thread_limiter().total_tokens = 1
    with ThreadPoolExecutor(1) as pool:
        loop.set_default_executor(pool)
        held = loop.run_in_executor(None, answered.wait)
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(to_thread.run_sync, answered.wait)
                await anyio.wait_all_tasks_blocked()
                try:
                    with anyio.fail_after(20):
                        yield
                finally:
                    answered.set()
        finally:
            await held


async def test_workers_start_and_are_replaced(site: Site) -> None:
    async with full_pools(), site.engine() as engine:
        assert (await engine.generate("a", seed=1, num_inference_steps=6)).output == expected("a")
        site.kill()
        await site.witness.done.wait()
        await engine.scale(2)
        assert (await engine.generate("b", seed=1, num_inference_steps=6)).output == expected("b")


@pytest.mark.slow
async def test_pictures_are_read_and_answers_decoded(tmp_path: Path) -> None:
    file, own = io.BytesIO(), {"costs_file": str(tmp_path / "costs"), "torch_threads": 1}
    Image.new("RGB", (32, 32), "red").save(file, "PNG")
    async with full_pools(), AsyncDiffusionEngine(model="demo", **own) as engine:
        given = {"image": file.getvalue(), "task": "image-to-image", "num_inference_steps": 2}
        out = await engine.generate("a red circle", seed=1, **given)
        assert (await web.png(out.images[0])).startswith(b"\x89PNG")
        await engine.close()
        assert (tmp_path / "costs").exists()


async def test_threads_that_wait_for_the_engine_outlive_its_worker(site: Site, gate: Gate) -> None:
    """As the plain functions are that answer a web application's requests."""
    to_thread.current_default_thread_limiter().total_tokens = 3
    async with site.engine() as engine:
        outcomes: list[object] = []

        async def first(name: str, **params: str) -> None:
            outcomes.append((await engine.generate(name, seed=1, num_inference_steps=6, **params)).output)

        with anyio.fail_after(20):
            async with anyio.create_task_group() as group:
                for name in "abcdef":
                    group.start_soon(
                        to_thread.run_sync, from_thread.run, functools.partial(first, name, gate=str(gate.path))
                    )
                await gate.reached()
                site.kill()
                gate.close()
        assert sorted(map(str, outcomes)) == sorted(str(expected(name)) for name in "abcdef")
