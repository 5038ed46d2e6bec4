"""A Ray cluster that is gone, all of it: whoever asks Ray waits for a minute. No engine does."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pytest

from steploom.config import EngineConfig
from steploom.executor import ray_cluster
from steploom.executor.ray import Actor, RayExecutor
from steploom.executor.ray_cluster import Cluster

GONE_S = 0.1
TESTS = Path(__file__).parents[1]


class Silent:
    """Ray, which has joined a cluster and does not answer any more."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.ends = threading.Event()
        self.util = SimpleNamespace(remove_placement_group=lambda group: self._hang("remove"))

    def _hang(self, what: str) -> None:
        self.asked.append(what)
        self.ends.wait()
        self.asked.append(f"end of {what}")

    def is_initialized(self) -> bool:
        return False

    def init(self, **settings: Any) -> None:
        pass

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 1.0}

    def shutdown(self) -> None:
        self._hang("shutdown")


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Silent]:
    ray = Silent()
    monkeypatch.setattr(ray_cluster, "import_ray", lambda: ray)
    monkeypatch.setattr(ray_cluster, "_session", ray_cluster._Session())
    yield ray
    ray.ends.set()


def placed(cluster: Cluster) -> Actor:
    """An actor that Ray has started, so it believes."""
    actor = Actor(0, cluster, {}, "")
    actor._group, actor._actor = object(), object()
    return actor


async def test_an_actor_is_given_up_when_ray_does_not_answer(silent: Silent) -> None:
    cluster = Cluster(EngineConfig(ray_gone_timeout_s=GONE_S))
    cluster.join()
    actor = placed(cluster)
    before = time.monotonic()
    actor.kill()
    actor.abandon()
    assert time.monotonic() - before < 5, "nobody waits in the event loop"
    with anyio.fail_after(20):
        await actor.end(0.0)
    assert silent.asked == ["remove"], "once"


async def test_an_executor_is_closed_when_ray_does_not_answer(silent: Silent) -> None:
    executor = RayExecutor(EngineConfig(ray_gone_timeout_s=GONE_S))
    with anyio.fail_after(20):
        await executor._prepare(lambda line: None)
        await executor.shutdown()
    assert silent.asked == ["shutdown"]


async def test_a_silent_cluster_is_left_all_the_same(silent: Silent) -> None:
    """Only whoever has left it is not ended by Ray, a minute later."""
    executor = RayExecutor(EngineConfig(ray_gone_timeout_s=GONE_S))
    with anyio.fail_after(20):
        await executor._prepare(lambda line: None)
        placed(executor._cluster).abandon()
        await executor.shutdown()
    assert silent.asked == ["remove", "shutdown"]


async def test_a_start_that_ray_does_not_answer_can_be_cancelled(silent: Silent) -> None:
    silent.util.placement_group = lambda bundles: silent._hang("group")
    actor = Actor(0, cluster := Cluster(EngineConfig(ray_gone_timeout_s=GONE_S)), {}, "")
    cluster.join()
    with anyio.fail_after(20):
        with anyio.move_on_after(GONE_S):
            await actor.open(lambda: None)
        await actor.end(0.0)
    assert silent.asked == ["group"]


async def test_what_ray_is_told_is_told_before_it_is_left(silent: Silent) -> None:
    cluster = Cluster(EngineConfig(ray_gone_timeout_s=60))
    cluster.join()
    placed(cluster).abandon()
    leaving = asyncio.wrap_future(ray_cluster.apart(cluster.leave))
    with anyio.move_on_after(GONE_S):  # as long as it takes to go wrong
        await asyncio.shield(leaving)
    silent.ends.set()
    await leaving
    assert silent.asked == ["remove", "end of remove", "shutdown", "end of shutdown"]


CHILD = """
import asyncio, json, sys, time
import ray
from ray_site import MortalRay
from steploom import AsyncDiffusionEngine, EngineObserver

class Lost(EngineObserver):
    def __init__(self):
        self.lost = asyncio.Event()
    def on_fault(self, fault):
        self.lost.set()

async def main():
    model, address, when = sys.argv[1:]
    engine = AsyncDiffusionEngine(model=model, ray_address=address, costs_file=None, restart_backoff_s=0.001,
                                  distributed_executor_backend=MortalRay)
    engine.observers.append(seen := Lost())
    await engine.start()
    print("serves", flush=True)
    assert await asyncio.to_thread(sys.stdin.readline)
    latest = 0.0

    async def beat():
        nonlocal latest
        while True:
            began = time.monotonic()
            await asyncio.sleep(0.01)
            latest = max(latest, time.monotonic() - began)

    beats = asyncio.create_task(beat())
    if when == "lost":  # and a replacement is asked for
        await seen.lost.wait()
        await asyncio.sleep(1)
    began = time.monotonic()
    await engine.close()
    print(json.dumps([time.monotonic() - began, latest, ray.is_initialized()]), flush=True)
    beats.cancel()

asyncio.run(main())
print("ends", flush=True)
"""


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(300)
def test_an_engine_whose_cluster_is_gone_can_be_closed(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    from ray_site import cluster

    model = tmp_path / "model"
    model.write_text("")
    path = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, sys.path)])}
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": path}
    with cluster(2) as nodes, contextlib.ExitStack() as stack:
        children: list[subprocess.Popen[str]] = []
        for when in ("at once", "lost"):
            command = [sys.executable, "-c", CHILD, str(model), nodes.address, when]
            children.append(stack.enter_context(subprocess.Popen(command, **pipes)))
            stack.callback(children[-1].kill)
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == "serves\n"
        nodes.kill_all()
        for child in children:
            assert child.stdin is not None
            child.stdin.write("\n")
            child.stdin.flush()
        for child in children:
            assert child.stdout is not None
            took, latest, joined = json.loads(child.stdout.readline())
            assert took < 30, "not the minute that Ray waits"
            assert latest < 1, "the event loop goes on"
            assert not joined, "or Ray would end the process"
            assert child.stdout.readline() == "ends\n"
            assert child.wait(60) == 0
