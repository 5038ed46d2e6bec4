"""Workers on the nodes of a real Ray cluster: placed, lost with their node, replayed, replaced, never left behind."""

from __future__ import annotations

import base64
import contextlib
import io
import socket
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import httpx
import numpy as np
import psutil
import pytest
import torch
from mortal_site import asking
from PIL import Image
from processes import gone
from scripted_runner import Gate

from steploom import AsyncDiffusionEngine, EngineConfig, EngineObserver
from steploom.errors import ConfigError, EngineDead, EngineError, WorkerDied

ray = pytest.importorskip("ray")

from ray_site import Nodes, RaySite, cluster  # noqa: E402 - needs Ray

# A cluster, and models that load in several processes, need both cores, and minutes.
pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with cluster(2) as nodes:
        yield nodes


@pytest.fixture
def site(tmp_path: Path, nodes: Nodes) -> Any:
    site = RaySite(tmp_path)
    site.nodes = nodes
    yield site
    assert not ray.is_initialized()


class Busy(EngineObserver):
    """Knows when each of two workers has made some steps of several requests."""

    def __init__(self) -> None:
        self.steps = [0, 0]
        self.both = anyio.Event()

    def on_tick(self, output: Any, result: Any, began: float, ended: float) -> None:
        self.steps[output.worker] += sum(report.stepped for report in result.reports)
        if min(self.steps) >= 8:
            self.both.set()


def alone(model: Path, seeds: int, params: dict[str, Any]) -> list[torch.Tensor]:
    """What the pipeline gives by itself."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    return [
        pipe(f"picture {seed}", generator=torch.Generator("cpu").manual_seed(seed), **params).images
        for seed in range(seeds)
    ]


async def test_requests_finish_when_the_node_of_a_worker_is_killed(
    site: RaySite, nodes: Nodes, tiny_model: Path
) -> None:
    own = {"ray_address": nodes.address, "costs_file": None, "torch_threads": 1, "worker_extension": "worker_pid.Pid"}
    params = {"num_inference_steps": 20, "output_type": "latent"}
    outputs: dict[int, torch.Tensor] = {}
    busy = Busy()
    async with AsyncDiffusionEngine(
        model=str(tiny_model), distributed_executor_backend="ray", data_parallel_size=2, max_batch=4, **own
    ) as engine:
        engine.observers += [site.witness, busy]
        pids = await engine.collective_rpc("pid")
        homes = [nodes.home(pid) for pid in pids]
        assert set(homes) == set(nodes.raylets), "a worker on each node"

        async def one(seed: int) -> None:
            outputs[seed] = (await engine.generate(f"picture {seed}", seed=seed, **params)).output.images

        async with anyio.create_task_group() as group:
            for seed in range(10):
                group.start_soon(one, seed)
            await busy.both.wait()
            victim = homes.index(nodes.raylets[1])  # the first one is this process's
            nodes.kill(nodes.raylets[1])
            await site.witness.begun.wait()
            assert "hung up" in str(site.witness.faults[0]), "long before Ray's own health checks"
        assert len(outputs) == 10
        assert engine.workers[victim] == "recovering"
        assert isinstance(engine.recovering, WorkerDied)
        closing = time.monotonic()
    assert time.monotonic() - closing < 30, "although a replacement waits for a place"
    await gone_all(pids)
    for seed, latents in enumerate(alone(tiny_model, 10, params)):
        assert torch.allclose(outputs[seed], latents, atol=1e-4 * float(latents.abs().max())), seed
    nodes.add()


async def gone_all(pids: list[int]) -> None:
    for pid in pids:
        if psutil.pid_exists(pid):
            await gone(psutil.Process(pid))


async def test_a_killed_worker_is_replaced_and_its_requests_are_replayed(site: RaySite, gate: Gate) -> None:
    async with site.engine() as engine:
        async with asking(engine) as asked:
            asked.ask("a", gate=str(gate.path), at=3)
            asked.ask("b")
            await gate.reached()
            site.kill()
            gate.close()
        asked.all_but()
        assert len(asked.outcomes) == 2
        assert [type(fault) for fault in site.witness.faults] == [WorkerDied]
        assert await engine.collective_rpc("pid") == [site.loads[1]]
    await gone_all(site.loads)


async def test_a_worker_that_stands_still_is_replaced(site: RaySite, tmp_path: Path) -> None:
    async with site.engine(data_parallel_size=2, tick_timeout_s=1) as engine:
        async with asking(engine) as asked:
            asked.ask("bad", at=3, stop=str(tmp_path / "once"))
        asked.all_but()
        await site.witness.done.wait()
        assert engine.workers == ["serves", "serves"]
    await gone_all(site.loads)


async def test_a_new_node_takes_the_place_of_a_lost_one(site: RaySite, nodes: Nodes) -> None:
    async with site.engine(data_parallel_size=2) as engine:
        pids = await engine.collective_rpc("pid")
        lost = next(pid for pid in pids if nodes.home(pid) != nodes.raylets[0])
        nodes.kill(nodes.home(lost))
        await site.witness.begun.wait()
        async with asking(engine) as asked:
            for i in range(8):
                asked.ask(f"r{i}")
        asked.all_but()
        before = set(nodes.raylets)
        await anyio.to_thread.run_sync(nodes.add)
        await site.witness.done.wait()
        now = await engine.collective_rpc("pid")
        assert engine.workers == ["serves", "serves"]
        assert {nodes.home(now[pids.index(lost)])} == set(nodes.raylets) - before
    await gone_all(now)


async def test_workers_are_added_and_removed_and_nothing_is_left(site: RaySite, nodes: Nodes) -> None:
    ray.init(nodes.address, configure_logging=False, log_to_driver=False)
    try:
        with pytest.raises(ConfigError, match="is connected to a cluster already, by its own"):
            async with site.engine(ray_address=nodes.address):
                pass
        async with site.engine(ray_address=None, ray_placement_timeout_s=1) as engine:
            await engine.scale(2)
            two = await engine.collective_rpc("pid")
            assert {nodes.home(pid) for pid in two} <= set(nodes.raylets)
            assert await engine.collective_rpc("device") == ["auto", "auto"], "not the second one: it sees one only"
            with pytest.raises(EngineError, match=r"has found no place.*needs CPU 1, GPU 1; .*GPU 2 \(0 free\)"):
                await engine.scale(3)
            assert engine.workers == ["serves", "serves"]
            await engine.scale(1)
            await gone_all(two[1:])
        assert ray.is_initialized(), "it is the application's"
        assert {group["state"] for group in ray.util.placement_group_table().values()} == {"REMOVED"}
        assert {actor["State"] for actor in ray._private.state.actors().values()} == {"DEAD"}
    finally:
        ray.shutdown()
    await gone_all(two)


async def test_a_start_that_finds_no_place_says_what_is_missing(site: RaySite) -> None:
    needs = {"GPU": 2, "CPU": 0.5}
    with pytest.raises(EngineDead, match=r"worker 0 of .*timeout_s=1: on one node it needs GPU 2, CPU 0\.5; .*GPU 2 "):
        async with site.engine(ray_resources=needs, ray_placement_timeout_s=1):
            pass


async def test_a_start_that_waits_for_a_place_can_be_cancelled(site: RaySite) -> None:
    began = time.monotonic()
    with anyio.move_on_after(2):
        async with site.engine(ray_resources={"GPU": 2}):
            pass
    assert time.monotonic() - began < 30


async def test_a_model_that_cannot_be_loaded_is_named_once(site: RaySite) -> None:
    with pytest.raises(EngineDead, match="could not be loaded: OSError: no such weights"):
        async with site.engine("fail"):
            pass
    await gone_all(site.loads)


@pytest.mark.parametrize(
    ("config", "error", "text"),
    [
        ({"ray_address": "127.0.0.1:9"}, EngineDead, "ray_address='127.0.0.1:9': nobody answers"),
        ({"ray_address": "ray://127.0.0.1:10001"}, ConfigError, "not a Ray Client"),
        ({"ray_address": "here"}, ConfigError, "HOST:PORT"),
        ({"device": "cuda:1"}, ConfigError, "device='cuda:1'"),
    ],
)
async def test_settings_that_do_not_do(site: RaySite, config: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        async with site.engine(**config):
            pass


@contextlib.asynccontextmanager
async def served(nodes: Nodes, port: int, **options: Any) -> AsyncIterator[Any]:
    """Two replicas of a server behind one address, and what Ray Serve says of them."""
    from ray import serve

    from steploom.server.ray_serve import application

    def run() -> None:
        ray.init(nodes.address, configure_logging=False, log_to_driver=False)
        serve.start(proxy_location="HeadOnly", http_options={"port": port})
        config = EngineConfig(distributed_executor_backend="inproc", torch_threads=1)
        serve.run(application(config, num_replicas=2, ray_actor_options={"num_cpus": 0.5}, **options))

    try:
        await anyio.to_thread.run_sync(run)
        assert await serve.get_app_handle("default").check_health.remote() is None
        yield serve.status().applications["default"].deployments["steploom"]
    finally:
        await anyio.to_thread.run_sync(serve.shutdown)
        ray.shutdown()


async def test_replicas_serve_behind_one_address_and_stream(site: RaySite, nodes: Nodes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    body = {"prompt": "a small blue star on a black background", "size": "64x64", "seed": 3, "num_inference_steps": 20}
    async with served(nodes, port) as status:
        assert status.replica_states == {"RUNNING": 2}
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            assert (await client.get("/ready")).json() == {"status": "ready"}
            images: list[Any] = []

            async def draw() -> None:
                answer = await client.post("/v1/images/generations", json=body)
                (image,) = answer.json()["data"]
                images.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(image["b64_json"]))), np.int16))

            async with anyio.create_task_group() as group:
                for _ in range(6):
                    group.start_soon(draw)
            assert len(images) == 6
            assert images[0].std() > 10
            assert all(abs(image - images[0]).max() <= 1 for image in images), "by whichever replica"
            asked = {**body, "stream": True, "partial_images": 3}
            arrivals: list[tuple[str, float]] = []
            async with client.stream("POST", "/v1/images/generations", json=asked) as stream:
                async for line in stream.aiter_lines():
                    if line.startswith("event: "):
                        arrivals.append((line, time.monotonic()))
            names = [name for name, _ in arrivals]
            assert names == ["event: image_generation.partial_image"] * 3 + ["event: image_generation.completed"]
            assert arrivals[-1][1] - arrivals[0][1] > 0.05, "as they were made, and not all at the end"


def test_arguments_of_a_file_that_mean_nothing() -> None:
    from steploom.server.ray_serve import build

    for arguments, text in (({"modle": "demo"}, "modle"), ({"server": {"pages": 1}}, "pages"), ({"max_batch": 0}, "0")):
        with pytest.raises(ConfigError, match=text):
            build(arguments)
    assert build({"model": "demo", "server": {"page": False}}) is not None
