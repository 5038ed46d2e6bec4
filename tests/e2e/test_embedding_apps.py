"""The five example applications on the built-in model: real servers, real clients, real signals."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import anyio
import httpx2
import psutil
import pytest
from embedding import EXAMPLES, SERVERS, Ends, application, events
from fakes import assert_empty
from PIL import Image

from steploom import AsyncDiffusionEngine, RequestCancelled

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
WISH = {"prompt": "a large red circle on a white background", "seed": 3, "num_inference_steps": 12}
LONG = {**WISH, "num_inference_steps": 900}
SERVED = pytest.mark.parametrize(("name", "server"), SERVERS.items())


def pixels(file: bytes) -> Any:
    return Image.open(io.BytesIO(file)).convert("RGB").tobytes()


@SERVED
async def test_an_application_on_the_built_in_model(name: str, server: str) -> None:
    engine, ends = AsyncDiffusionEngine(model="demo", torch_threads=1), Ends()
    engine.observers.append(ends)
    async with application(name, server, engine) as client, client:
        answer = await client.post("/draw", json={"prompt": "a", "num_inference_steps": 2})
        assert answer.status_code == 200  # and the lifespan has begun
        workers = psutil.Process().children(recursive=True)
        assert workers
        alone = (await engine.generate(**WISH)).images[0]
        drawn: dict[int, bytes] = {}

        async def draw(seed: int) -> None:
            drawn[seed] = (await client.post("/draw", json={**WISH, "seed": seed})).content

        async with anyio.create_task_group() as group:
            group.start_soon(draw, 3)
            group.start_soon(draw, 4)
        shared = [output.timings.mean_batch_requests for output, _ in ends.seen[2:] if output is not None]
        assert len(shared) == 2
        assert max(shared) > 1
        close = [abs(one - other) <= 1 for one, other in zip(pixels(drawn[3]), alone.tobytes(), strict=True)]
        assert all(close)
        assert pixels(drawn[4]) != pixels(drawn[3])

        async with client.stream("GET", "/stream", params=WISH) as response:
            kinds = []
            async for kind, told in events(response):
                if kind == "step" and told["preview"] and "step" not in kinds:
                    assert len(ends.seen) == 4, "its preview is here before its end"
                kinds.append(kind)
        assert kinds[0] == "queued"
        assert kinds.count("step") >= 5
        assert kinds[-1] == "finished"

        async with anyio.create_task_group() as group:
            group.start_soon(lambda: client.post("/draw", json=LONG))
            async with client.stream("GET", "/stream", params=LONG) as response:
                messages = events(response)
                while (await anext(messages))[0] != "step":
                    pass
                await messages.aclose()
            group.cancel_scope.cancel()
        with anyio.fail_after(120):
            await ends.become(7)
        assert all(isinstance(error, RequestCancelled) for _, error in ends.seen[5:])
        await client.post("/draw", json=WISH)
        assert (await engine.collective_rpc("stats", unique_reply_rank=0)).resident == 0
    assert_empty(engine)
    assert not any(worker.is_running() for worker in workers)


@contextlib.contextmanager
def running(name: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The example as its reader starts it, once it says that it runs, and its address."""
    env = {**os.environ, "STEPLOOM_TORCH_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [sys.executable, str(EXAMPLES / f"{name}.py"), port := str(free_port())],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            next(line for line in process.stdout if "unning on" in line)
            yield process, f"http://127.0.0.1:{port}"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


@SERVED
def test_ctrl_c_ends_it_although_somebody_watches(name: str, server: str) -> None:
    with running(name) as (process, address), httpx2.Client(base_url=address, timeout=120) as client:
        assert client.post("/draw", json={**WISH, "num_inference_steps": 2}).status_code == 200
        everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        assert len(everyone) > 1
        with client.stream("GET", "/stream", params=LONG) as response:
            next(response.iter_lines())
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the worker gets it too
            said = process.communicate(timeout=120)[0]
        assert process.returncode == 0, said
        assert not any(one.is_running() for one in everyone)
