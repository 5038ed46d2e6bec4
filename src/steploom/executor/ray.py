"""RayExecutor: workers as Ray actors on the nodes of a cluster, over authenticated TCP."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any

import anyio

from steploom.config import EngineConfig
from steploom.errors import EngineDead, EngineError, EngineNotRunning, ProtocolError
from steploom.executor.abstract import ProgressCallback
from steploom.executor.multiproc import MultiprocExecutor
from steploom.executor.process import WorkerProcess
from steploom.executor.ray_cluster import Cluster, apart
from steploom.executor.remote import RemoteSocket
from steploom.executor.worker import Worker
from steploom.worker.messages import Answer
from steploom.worker.remote import Door, RemoteWorker


class RayExecutor(MultiprocExecutor):
    """Executes ticks in actors of a Ray cluster that this machine is a node of.

    Ray finds each worker a place (a placement group), starts it there, and ends it. Ticks and answers do not pass
    through Ray, but over a connection between the engine and the actor, encrypted and with a key that only they know.
    """

    def __init__(self, config: EngineConfig, pipeline: Any = None) -> None:
        super().__init__(config, pipeline)
        self._cluster = Cluster(config)
        self._needs: Mapping[str, float] = {}
        self._tell: ProgressCallback = _nothing

    async def _prepare(self, on_progress: ProgressCallback) -> None:
        on_progress("joining the Ray cluster")
        await asyncio.wrap_future(apart(self._cluster.join))
        self._needs = await asyncio.wrap_future(apart(self._cluster.needs))
        self._tell = on_progress

    def _make(self, rank: int) -> Worker:
        assert self._context is not None
        actor = Actor(rank, self._cluster, self._needs, self.runner)
        actor.max_message_bytes = self.config.max_message_bytes
        socket = partial(RemoteSocket, self._context, config=self.config)
        return _RayWorker(rank, self.config, actor, socket, self._tell)

    async def shutdown(self) -> None:
        """Ends the actors, gives back their places, and leaves the cluster; see :meth:`DiffusionExecutor.shutdown`."""
        with anyio.CancelScope(shield=True):
            try:
                await super().shutdown()
            finally:
                with anyio.move_on_after(2 * self._cluster.gone_s):  # what it was told last may keep it for the first
                    await asyncio.wrap_future(apart(self._cluster.leave))


class _RayWorker(Worker):
    """A worker that is an actor. Of the devices that it sees the first one is its own."""

    def __init__(
        self,
        rank: int,
        config: EngineConfig,
        actor: Actor,
        open_socket: Callable[[Callable[[Answer], None], Callable[[ProtocolError], None]], RemoteSocket],
        on_progress: ProgressCallback,
    ) -> None:
        super().__init__(rank, config, actor, open_socket, device=0)
        self._actor = actor
        self._on_progress = on_progress

    async def start(self) -> None:
        """Has Ray start the actor somewhere, and connects to it."""
        assert isinstance(self.socket, RemoteSocket)
        door = await self._actor.open(self._exited)
        self._on_progress(f"worker {self.rank} is process {door.pid} at {door.url}")
        await self.socket.connect(door, self._actor.hung_up)


class Actor(WorkerProcess):
    """A process that Ray starts, in a place of its own. Its end is seen by that of its connection, or said by Ray.

    Args:
        rank: Which worker.
        cluster: Where.
        needs: What it asks of its node.
        runner: Name of its runner's factory.
    """

    def __init__(self, rank: int, cluster: Cluster, needs: Mapping[str, float], runner: str) -> None:
        super().__init__(rank, "", runner, _nothing)
        self._cluster = cluster
        self._needs = needs
        self._loop = asyncio.get_running_loop()
        self._on_exit: Callable[[], None] | None = None
        self._words = ""
        self._lock = threading.Lock()  # held while Ray is asked, in threads of its own alone
        self._group: Any = None
        self._actor: Any = None
        self._waiting = threading.Event()
        self._waiting.set()
        self._parting: Future[None] | None = None

    @property
    def last_lines(self) -> str:
        """What is known of its end."""
        return self._words

    async def open(self, on_exit: Callable[[], None]) -> Door:
        """Has it placed and started; returns where it listens. ``on_exit`` is called when it has ended.

        Raises:
            EngineDead: There is no place for it, or it does not start.
        """
        self._on_exit = on_exit
        await asyncio.wrap_future(apart(self._ask))
        if not await asyncio.wrap_future(apart(self._wait)):
            raise EngineDead(await asyncio.wrap_future(apart(self._cluster.shortage, self.rank, self._needs)))
        host, door = await asyncio.wrap_future(apart(self._start))
        try:
            return Door(*await asyncio.wrap_future(door))
        except Exception as error:  # noqa: BLE001 - what Ray raises has no common base
            mend = "is steploom installed there, in the same version?"
            raise EngineDead(f"worker {self.rank} does not start at {host} ({mend}): {error}") from None

    def _ask(self) -> None:
        """Asks for a place."""
        with self._lock:
            if self._unwanted:
                raise EngineNotRunning("the engine was closed")
            self._group = self._cluster.asked(self._cluster.ray.util.placement_group, [dict(self._needs)])
            self._waiting.clear()

    def _wait(self) -> bool:
        """Waits for the place; whether there was one in time."""
        try:
            group = self._group
            return group is not None and self._cluster.asked(group.wait, self._cluster.patience_s)
        finally:
            self._waiting.set()

    def _start(self) -> tuple[str, Future[Any]]:
        """Starts it in its place, and has it serve: where, and its door."""
        ray, needs = self._cluster.ray, dict(self._needs)
        with self._lock:
            if self._group is None:
                raise EngineNotRunning("the engine was closed")
            node = self._cluster.asked(ray.util.placement_group_table, self._group)["bundles_to_node_id"][0]
            hosts = {one["NodeID"]: one["NodeManagerAddress"] for one in self._cluster.asked(ray.nodes)}
            place = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(self._group, 0)
            sizes = {"num_cpus": needs.pop("CPU", 0), "num_gpus": needs.pop("GPU", 0)}
            if "memory" in needs:
                sizes["memory"] = needs.pop("memory")
            options = {**sizes, "resources": needs, "scheduling_strategy": place, "max_restarts": 0}
            self._actor = self._cluster.asked(ray.remote(RemoteWorker).options(**options).remote)
            door = self._actor.listen.remote(hosts[node], self.max_message_bytes).future()
            self._actor.serve.remote(self._runner).future().add_done_callback(self._told)
            return hosts[node], door

    def _told(self, done: Future[Any]) -> None:
        """Ray says how it ended, in a thread of its own."""
        with contextlib.suppress(RuntimeError):  # the loop has ended as well
            self._loop.call_soon_threadsafe(self._ended_so, done)

    def _ended_so(self, done: Future[Any]) -> None:
        error = done.exception()
        if error is None:
            self.exitcode = done.result()
        else:
            self._words = str(error).strip()
        self.exited.set()
        self._tell_end()

    def hung_up(self) -> None:
        """Its connection has ended, which is known long before Ray says so."""
        self._words = "it has hung up: its process or its node is gone, or the network between"
        self._tell_end()

    def _tell_end(self) -> None:
        on_exit, self._on_exit = self._on_exit, None
        if on_exit is not None:
            on_exit()

    def _let_go(self) -> None:
        """Ends it, and gives its place back."""
        with self._lock:
            self._unwanted = True
            group, self._group = self._group, None
            if group is None:
                return
            with contextlib.suppress(EngineError):  # then the cluster is gone, and all of it
                self._cluster.asked(self._cluster.ray.util.remove_placement_group, group)  # with the actor in it
            self._waiting.wait(self._cluster.gone_s)

    def _part(self) -> Future[None]:
        """Has Ray end it, once; the future of when it has been told."""
        if self._parting is None:
            self._parting = self._cluster.tell(self._let_go)
        return self._parting

    def kill(self) -> None:
        """Ends it at once; Ray is told in a thread."""
        self._part()

    def abandon(self) -> None:
        """Ends it at once, and leaves nothing of it behind; Ray is told in a thread."""
        self._part()

    async def end(self, grace_s: float) -> None:
        """Returns when it is gone: by itself within ``grace_s``, else ended by Ray; or when Ray does not answer."""
        with anyio.move_on_after(grace_s if self._actor is not None else 0):
            await self.exited.wait()
        with anyio.move_on_after(self._cluster.gone_s):
            await asyncio.wrap_future(self._part())
            if self._actor is not None:
                await self.exited.wait()


def _nothing(line: str) -> None:
    pass
