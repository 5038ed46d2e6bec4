"""The example executors in front of real processes with the built-in model, and whether they keep the contract."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import numpy as np
import pytest
import torch
from PIL import ImageChops

from examples import EXAMPLES, example
from steploom import (
    AsyncDiffusionEngine,
    DeadlineExceeded,
    DiffusionEngine,
    DiffusionRequest,
    EngineConfig,
    EngineError,
    EngineNotRunning,
    GenerationFailed,
    InvalidRequest,
    RequestCancelled,
)
from steploom.executor import AttachedExecutor, DiffusionExecutor
from steploom.testing import check_executor

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
PROMPT = "a large red circle above a small blue square on a white background"
ASKED = {"num_inference_steps": 6, "guidance_scale": 4.0, "seed": 3}
HttpExecutor = example("http_executor").HttpExecutor
GRPC = example("grpc_executor")
GrpcExecutor = GRPC.GrpcExecutor


@contextlib.contextmanager
def process(*command: str | Path, ready: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process, once it has said that it is ready; and what it said."""
    with subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
    ) as started:
        try:
            assert started.stdout is not None
            yield started, next(line for line in started.stdout if ready in line)
        finally:
            started.terminate()
            started.wait(30)


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="s", dir="/tmp") as name:  # a socket's path has to be short
        yield Path(name)


@pytest.fixture(scope="module")
def alone() -> Any:
    """The image of an engine of ours."""
    with DiffusionEngine(model="demo", distributed_executor_backend="inproc", torch_threads=1) as engine:
        return engine.generate(PROMPT, **ASKED).images[0]


@pytest.fixture
def server() -> Iterator[str]:
    command = ["-m", "steploom", "serve", "--port", "0", "--engine", "torch_threads=1"]
    with process(*command, ready="is ready at") as (_, said):
        found = re.search(r"http://[^\s/]+", said)
        assert found is not None
        yield found[0]


@pytest.fixture
def service(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    address = f"unix:{folder}/grpc"
    with process(EXAMPLES / "grpc_service.py", address, ready="listening at") as (started, _):
        yield started, address


@pytest.fixture(scope="module")
def lasting() -> Iterator[str]:
    """The address of a service that nobody ends."""
    with tempfile.TemporaryDirectory(prefix="s", dir="/tmp") as name:
        address = f"unix:{name}/grpc"
        with process(EXAMPLES / "grpc_service.py", address, ready="listening at"):
            yield address


def same(image: Any, other: Any) -> bool:
    return max(high for _, high in ImageChops.difference(image, other).getextrema()) <= 1


def ask(kind: type[DiffusionExecutor], model: str) -> EngineConfig:
    return EngineConfig(model=model, distributed_executor_backend=kind)


async def test_http(server: str, alone: Any) -> None:
    async with AsyncDiffusionEngine(ask(HttpExecutor, server)) as engine:
        assert same((await engine.generate(PROMPT, **ASKED)).images[0], alone)
        with pytest.raises(InvalidRequest, match="guidance_scale"):
            await engine.generate(PROMPT, guidance_scale=10_000.0)
        assert len((await engine.generate(PROMPT, num_images_per_prompt=2, **ASKED)).images) == 2
        with pytest.raises(InvalidRequest, match="n: does not travel to the server; give num_images_per_prompt"):
            await engine.generate(PROMPT, n=2)
    await check_executor(HttpExecutor, ask(HttpExecutor, server), num_inference_steps=4)


async def test_grpc(service: tuple[subprocess.Popen[str], str], alone: Any) -> None:
    started, address = service
    async with AsyncDiffusionEngine(ask(GrpcExecutor, address)) as engine:
        out = await engine.generate(PROMPT, return_trajectory=True, **ASKED)
        assert same(out.images[0], alone)
        assert out.trajectory_latents.shape[0] == ASKED["num_inference_steps"]
        latents = await engine.generate(PROMPT, output_type="latent", **ASKED)
        assert isinstance(latents.images, torch.Tensor)
        assert np.isfinite(latents.images.numpy()).all()
        drawn = torch.Generator().manual_seed(ASKED["seed"])
        out = await engine.generate(PROMPT, generator=drawn, **{k: v for k, v in ASKED.items() if k != "seed"})
        assert same(out.images[0], alone)
        assert not torch.equal(drawn.get_state(), torch.Generator().manual_seed(ASKED["seed"]).get_state())
        with pytest.raises(InvalidRequest, match=r"guidance_scal: .*guidance_scale"):
            await engine.generate(PROMPT, guidance_scal=4.0)
        with pytest.raises(InvalidRequest, match="preview_every"):
            await engine.generate(PROMPT, preview_every=1)
        with pytest.raises(DeadlineExceeded):
            await engine.generate(PROMPT, num_inference_steps=900, timeout=0.5)
        await engine.generate(PROMPT, num_inference_steps=2)  # so that a step has ended since
        (stats,) = await engine.collective_rpc("stats")
        assert stats.resident == 0, "the service ends what nobody waits for"
        with pytest.raises(InvalidRequest, match="no_such_method"):
            await engine.collective_rpc("no_such_method")
        await engine.check_health()
        await end_of(engine, started)
        with pytest.raises(EngineError):
            await engine.generate(PROMPT)


async def end_of(engine: AsyncDiffusionEngine, started: subprocess.Popen[str]) -> None:
    """The service is killed while requests run, and the engine knows."""
    failures: list[Exception] = []

    async def lost() -> None:
        try:
            await engine.generate(PROMPT, num_inference_steps=900)
        except (EngineError, GenerationFailed) as error:
            failures.append(error)

    async with anyio.create_task_group() as group:
        group.start_soon(lost)
        group.start_soon(lost)
        await anyio.wait_all_tasks_blocked()
        started.kill()
    assert len(failures) == 2


async def test_grpc_tells_what_goes_with_an_output(folder: Path) -> None:
    """The text of tokens, which the service's engine has added to what the pipeline gave."""
    address, model = f"unix:{folder}/grpc", "tiny_language:llada"
    asked: dict[str, Any] = {"num_inference_steps": 2, "seed": 3, "gen_length": 8, "block_length": 4}
    asked |= {"output_type": "seq"}
    beside = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    with process(EXAMPLES / "grpc_service.py", address, model, ready="listening at", PYTHONPATH=beside):
        async with AsyncDiffusionEngine(ask(GrpcExecutor, address)) as engine:
            there = await engine.generate("a cat", **asked)
    async with AsyncDiffusionEngine(model=model, distributed_executor_backend="inproc") as engine:
        here = await engine.generate("a cat", **asked)
    assert here.texts
    assert there.texts == here.texts
    assert there.text == here.text


async def test_grpc_keeps_the_contract(service: tuple[subprocess.Popen[str], str]) -> None:
    started, address = service
    await check_executor(GrpcExecutor, ask(GrpcExecutor, address), lose=lambda _: started.kill())


async def test_grpc_calls_that_are_late(lasting: str) -> None:
    """Whoever's clock decides, a call has its answer or a TimeoutError, and the engine serves on."""
    late = 0
    async with AsyncDiffusionEngine(ask(GrpcExecutor, lasting)) as engine, anyio.create_task_group() as group:
        executor: Any = engine._core.executor
        for timeout in (0, -1.0, 1e-9):
            with pytest.raises(TimeoutError):
                await engine.collective_rpc("stats", timeout)
        for busy in (False, True):
            if busy:
                group.start_soon(partial(engine.generate, PROMPT, num_inference_steps=900))
                await engine.generate(PROMPT, num_inference_steps=1)
            for milliseconds in [*range(1, 51), *[1, 2, 3, 5, 8] * 10]:
                try:
                    (stats,) = await engine.collective_rpc("stats", milliseconds / 1000)
                    assert stats.resident == busy
                except TimeoutError:
                    late += 1
            for _ in range(20):  # and the service's clock, where ours would wait
                with pytest.raises(TimeoutError, match="DEADLINE_EXCEEDED"):
                    await executor._ask("Call", GRPC.pack(GRPC.Call("stats", 1e-6)))
        group.cancel_scope.cancel()
    assert late > 20


async def test_grpc_engines_that_share_a_service_have_ids_of_their_own(lasting: str) -> None:
    """Each names its requests as it likes, and may ask anew under a name whose request it has just given up."""
    outputs: list[Any] = []
    asked = {"num_inference_steps": 30, "seed": 3, "request_id": "first"}

    async def one(engine: AsyncDiffusionEngine) -> None:
        outputs.append(await engine.generate(PROMPT, **asked))

    async with (
        AsyncDiffusionEngine(ask(GrpcExecutor, lasting)) as here,
        AsyncDiffusionEngine(ask(GrpcExecutor, lasting)) as there,
        anyio.create_task_group() as group,
    ):
        for engine in (here, there):
            group.start_soon(one, engine)
    assert [out.request_id for out in outputs] == ["first", "first"]
    assert same(outputs[0].images[0], outputs[1].images[0])


async def test_grpc_whoever_waits_may_leave(lasting: str) -> None:
    long = DiffusionRequest(PROMPT, num_inference_steps=900)
    async with AsyncDiffusionEngine(ask(GrpcExecutor, lasting)) as engine:
        executor: Any = engine._core.executor

        async def at_work() -> int:
            """What the service holds, once it has served another request."""
            await engine.generate(PROMPT, num_inference_steps=2)
            (stats,) = await engine.collective_rpc("stats")
            return stats.resident

        task = asyncio.get_running_loop().create_task(executor.execute_model([long]))
        assert await at_work() == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await at_work() == 0
        async with anyio.create_task_group() as group:
            group.start_soon(executor.execute_model, [long])
            assert await at_work() == 1
            group.cancel_scope.cancel()
        assert await at_work() == 0
        for seconds in (0, 0.001, 0.05):
            with anyio.move_on_after(seconds) as scope:
                await executor.wait_failed()
            assert scope.cancelled_caught
        assert await at_work() == 0


async def test_grpc_closing_at_work(lasting: str) -> None:
    failures: list[BaseException] = []
    engine = AsyncDiffusionEngine(ask(GrpcExecutor, lasting))
    await engine.start()

    async def closed() -> None:
        with pytest.raises((RequestCancelled, EngineNotRunning)) as caught:
            await engine.generate(PROMPT, num_inference_steps=900)
        failures.append(caught.value)

    async with anyio.create_task_group() as group:
        for _ in range(4):
            group.start_soon(closed)
        await engine.generate(PROMPT, num_inference_steps=2)
        await engine.close()
    assert len(failures) == 4
    with pytest.raises(EngineNotRunning):
        await engine.generate(PROMPT)
    async with AsyncDiffusionEngine(ask(GrpcExecutor, lasting)) as again:
        await again.generate(PROMPT, num_inference_steps=2)
        (stats,) = await again.collective_rpc("stats")
        assert stats.resident == 0, "the service ends what nobody waits for"


async def test_grpc_nobody_there_is_told_at_the_start(folder: Path) -> None:
    config = EngineConfig(model=f"unix:{folder}/nobody", distributed_executor_backend=GrpcExecutor, start_timeout_s=0.5)
    with pytest.raises(EngineError, match=r"start_timeout_s=0\.5: model='unix:.*/nobody' was not loaded in time"):
        async with AsyncDiffusionEngine(config):
            pass


async def test_grpc_notices_a_service_that_stands_still(service: tuple[subprocess.Popen[str], str]) -> None:
    """As one whose machine has vanished: its connection says nothing, and does not end."""
    started, address = service
    executor = GrpcExecutor(ask(GrpcExecutor, address))
    await executor.start()
    try:
        async with anyio.create_task_group() as group:

            async def stop() -> None:
                await executor.collective_rpc("ping")
                started.send_signal(signal.SIGSTOP)

            group.start_soon(stop)
            with anyio.fail_after(50):
                assert isinstance(await executor.wait_failed(), EngineError)
    finally:
        started.kill()
        await executor.shutdown()


async def test_grpc_over_tcp_wants_the_token(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, address = EXAMPLES / "grpc_service.py", "127.0.0.1:0"
    refused = await anyio.to_thread.run_sync(
        partial(subprocess.run, [sys.executable, script, address], capture_output=True, text=True, check=False)
    )
    assert "set STEPLOOM_GRPC_TOKEN" in refused.stderr
    with process(script, address, ready="listening at", STEPLOOM_GRPC_TOKEN="right") as (_, said):
        address = said.split()[-1]
        for token, works in (("wrong", False), ("right", True)):
            monkeypatch.setenv("STEPLOOM_GRPC_TOKEN", token)
            executor = GrpcExecutor(ask(GrpcExecutor, address))
            if works:
                assert (await executor.start()).pipeline_class
            else:
                with pytest.raises(EngineError, match="UNAUTHENTICATED"):
                    await executor.start()
            await executor.shutdown()


async def test_attached(folder: Path, alone: Any) -> None:
    address = folder / "worker"
    with process("-m", "steploom.worker", "--listen", address, ready="listens at") as (started, _):
        kind = AttachedExecutor.at(address)
        for _ in range(2):
            async with AsyncDiffusionEngine(
                model="demo", torch_threads=1, distributed_executor_backend=kind, costs_file=None
            ) as engine:
                assert same((await engine.generate(PROMPT, **ASKED)).images[0], alone)
                (stats,) = await engine.collective_rpc("stats")
                assert stats.resident == 0
        assert stats.ticks > 2 * ASKED["num_inference_steps"], "the same worker"

        await check_executor(kind, EngineConfig(torch_threads=1), lose=lambda _: started.send_signal(signal.SIGKILL))
