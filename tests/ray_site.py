"""A Ray cluster for tests, and engines on it whose workers are mortal."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import psutil
from mortal_site import Site

from steploom import AsyncDiffusionEngine
from steploom.executor.ray import RayExecutor


class MortalRay(RayExecutor):
    runner = "mortal_runner:make"


class Nodes:
    """Nodes of one CPU and, so they say, one GPU each on this machine. The first one is the head, and the driver's.

    Attributes:
        address: Where its head is.
        raylets: The process of each node, and with it all that it has started.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._hear()

    def _hear(self) -> None:
        assert self._process.stdout is not None
        said = json.loads(self._process.stdout.readline())
        self.address: str = said["address"]
        self.raylets: list[int] = said["raylets"]

    def add(self) -> None:
        """One node more."""
        assert self._process.stdin is not None
        self._process.stdin.write("add\n")
        self._process.stdin.flush()
        self._hear()

    def home(self, worker: int) -> int:
        """The raylet that has started this process."""
        parents = {parent.pid for parent in psutil.Process(worker).parents()}
        (home,) = parents & set(self.raylets)
        return home

    def kill(self, raylet: int) -> None:
        """A node is gone from one moment to the next, with all that runs there."""
        there = psutil.Process(raylet)
        for process in [there, *there.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def kill_all(self) -> None:
        """The whole cluster is gone, its head too."""
        for process in psutil.Process(self._process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@contextlib.contextmanager
def cluster(nodes: int) -> Iterator[Nodes]:
    """A cluster, gone afterwards."""
    command = [sys.executable, str(Path(__file__).parent / "ray_nodes.py"), str(nodes)]
    path = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])}
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="r", dir="/tmp", ignore_cleanup_errors=True))
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        process = stack.enter_context(subprocess.Popen([*command, folder], text=True, env=path, **pipes))
        before = psutil.Process(process.pid)
        try:
            yield Nodes(process)
        finally:
            left = before.children(recursive=True)
            process.communicate(timeout=60)
            for one in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()


class RaySite(Site):
    """A model's file, and engines for it on a cluster."""

    nodes: Nodes

    @contextlib.asynccontextmanager
    async def engine(self, *plan: str, **config: Any) -> AsyncIterator[AsyncDiffusionEngine]:
        """An engine whose loads go by ``plan``; no task of it is left afterwards, and no actor."""
        self.model.write_text("\n".join(plan))
        own = {"distributed_executor_backend": MortalRay, "costs_file": None, "restart_backoff_s": 0.001}
        own |= {"ray_address": self.nodes.address, **config}
        engine = AsyncDiffusionEngine(model=str(self.model), **own)
        engine.observers.append(self.witness)
        tasks = asyncio.all_tasks()
        try:
            async with engine:
                yield engine
        finally:
            assert asyncio.all_tasks() == tasks
