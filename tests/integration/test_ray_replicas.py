"""Replicas of the server on two nodes of a Ray cluster: both serve, and when one dies the other answers."""

from __future__ import annotations

import base64
import io
import socket
from collections.abc import Iterator
from typing import Any

import anyio
import anyio.to_thread
import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

pytest.importorskip("ray")

from ray_site import Nodes, cluster
from test_ray import served

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(400)]

BODY = {"prompt": "a small blue star on a black background", "size": "64x64", "seed": 3, "num_inference_steps": 8}
CLIENTS = 4
ROUNDS = 20
"""How often it is tried to have both replicas at work."""
TRIES = 100
"""How often a client asks for an image, at most: nobody waits long for a refusal."""


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    # the proxy, of which this test asks one, is not to prefer the replica of its own node, as it does by default
    monkeypatch.setenv("RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING", "0")
    with cluster(2) as nodes:
        yield nodes


def replicas(nodes: Nodes) -> dict[int, psutil.Process]:
    """The process of each node that is a replica."""
    found: dict[int, psutil.Process] = {}
    for raylet in nodes.raylets:
        for process in psutil.Process(raylet).children(recursive=True):
            try:
                if process.name().startswith("ray::Serve") and "Replica" in "".join(process.cmdline()):
                    found[raylet] = process
            except psutil.NoSuchProcess:
                continue
    return found


async def finished(client: httpx.AsyncClient) -> set[int]:
    """How many requests the replicas have finished, of which any one may answer."""
    counts: set[int] = set()
    for _ in range(TRIES):
        text = (await client.get("/metrics")).text
        lines = [line for line in text.splitlines() if line.startswith("steploom_requests_total{")]
        counts.add(sum(int(float(line.rpartition(" ")[2])) for line in lines))
        if len(counts) == 2:
            break
    return counts


async def draw(client: httpx.AsyncClient, refused: list[int]) -> Any:
    """An image; whoever is refused asks again."""
    for _ in range(TRIES):
        answer = await client.post("/v1/images/generations", json=BODY)
        if answer.status_code == 200:
            (image,) = answer.json()["data"]
            return np.asarray(Image.open(io.BytesIO(base64.b64decode(image["b64_json"]))), np.int16)
        assert answer.status_code >= 500, answer.text
        refused.append(answer.status_code)
    raise AssertionError(f"nobody answers: {refused}")


async def test_both_replicas_serve_and_one_answers_for_the_other_when_it_dies(nodes: Nodes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    spread = {"max_replicas_per_node": 1, "health_check_period_s": 1.0, "health_check_timeout_s": 5.0}
    images: list[Any] = []
    refused: list[int] = []

    async def one() -> None:
        images.append(await draw(client, refused))

    async with (
        served(nodes, port, **spread),
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):
        before = replicas(nodes)
        assert set(before) == set(nodes.raylets), "one on each node"
        counts: set[int] = set()
        for many in (7, *[2] * ROUNDS):  # an odd number in all: whatever the two have finished, it differs
            async with anyio.create_task_group() as group:
                for _ in range(many):
                    group.start_soon(one)
            counts = await finished(client)
            if 0 not in counts:
                break
        assert len(counts) == 2
        assert min(counts) > 0, "both"
        assert sum(counts) == len(images)
        assert not refused

        victim = before[nodes.raylets[0]]

        async def ask_on() -> None:
            while victim in replicas(nodes).values() or len(replicas(nodes)) < 2:  # until there is another one
                await one()
            await one()

        async with anyio.create_task_group() as group:
            for _ in range(CLIENTS):
                group.start_soon(ask_on)
            await one()
            victim.kill()
        assert len(images) > sum(counts) + CLIENTS
        assert images[0].std() > 10
        assert all(abs(image - images[0]).max() <= 1 for image in images), "by whichever replica"
