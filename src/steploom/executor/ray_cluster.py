"""The Ray cluster of an engine: joined and left, asked for places. What blocks runs in threads (:func:`apart`)."""

from __future__ import annotations

import importlib
import math
import socket
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from steploom.config import LONGEST_S, EngineConfig
from steploom.errors import ConfigError, EngineDead, EngineNotRunning, unusable

T = TypeVar("T")


def apart(question: Callable[..., T], *args: Any) -> Future[T]:
    """Asks in a thread of its own; the future of the answer. Whoever does not wait for it leaves the thread to itself.

    When a cluster is gone, Ray keeps whoever asks it for a minute. Neither the event loop, nor a pool that others need,
    nor the end of the interpreter is to wait for that.
    """
    answer: Future[T] = Future()
    answer.set_running_or_notify_cancel()

    def ask() -> None:
        try:
            answer.set_result(question(*args))
        except BaseException as error:  # noqa: BLE001 - it is the answer
            answer.set_exception(error)

    threading.Thread(target=ask, name="steploom-ray", daemon=True).start()
    return answer


def import_ray() -> Any:
    """The package, which takes half a second to import.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        mend = "pip install 'steploom[ray]'"
        raise ConfigError(f"distributed_executor_backend='ray': {unusable(error)}; {mend}") from None


class _Session:
    """This process's one connection to a cluster: the engines share it, and the last one ends it, if they began it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._address: str | None = None
        self._ours = False

    def enter(self, ray: Any, address: str | None, reach_s: float) -> None:
        """One engine more.

        Raises:
            ConfigError: The process is connected to another cluster.
            EngineDead: There is no cluster.
        """
        with self._lock:
            if not self._users:
                self._ours = not ray.is_initialized()
                if self._ours:
                    _connect(ray, address, reach_s)
                    self._address = address
            if address is not None and (not self._ours or address != self._address):
                whose = f"to {self._address or 'one that it has found'}" if self._ours else "by its own ray.init()"
                raise ConfigError(
                    f"ray_address={address!r}: this process is connected to a cluster already, {whose}; leave it None"
                )
            self._users += 1

    def leave(self, ray: Any) -> None:
        """One engine less."""
        with self._lock:
            self._users -= 1
            if not self._users and self._ours:
                ray.shutdown()


_session = _Session()


def _connect(ray: Any, address: str | None, reach_s: float) -> None:
    """Connects this process to the cluster there, or to the one whose node this machine is."""
    if address is not None:
        _check_address(address, reach_s)
    try:
        ray.init(address=address or "auto", configure_logging=False, log_to_driver=False)
    except Exception as error:  # noqa: BLE001 - what Ray raises has no common base
        at = "on this machine" if address is None else f"at ray_address={address!r}"
        mend = "start one with `ray start --head`, join one with `ray start --address=HOST:PORT`, or give ray_address"
        raise EngineDead(f"distributed_executor_backend='ray': no cluster {at} ({_line(error)}); {mend}") from None


def _check_address(address: str, reach_s: float) -> None:
    """Refuses an address where nobody answers in time: Ray would try it for a minute, and end this process.

    Raises:
        ConfigError: It is none.
        EngineDead: Nobody answers.
    """
    host, colon, port = address.rpartition(":")
    if "://" in address or not colon or not port.isdecimal():
        mend = "give HOST:PORT of its head, or None for the cluster of this machine"
        why = "; an engine is a part of the cluster, not a Ray Client" if address.startswith("ray:") else ""
        raise ConfigError(f"ray_address={address!r}: {mend}{why}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), min(reach_s, LONGEST_S)).close()
    except OSError as error:
        mend = "start it with `ray start --head`, or correct the address"
        raise EngineDead(f"ray_address={address!r}: nobody answers ({error}); {mend}") from None


class Cluster:
    """The cluster as one engine uses it.

    Args:
        config: The engine's settings.

    Attributes:
        ray: The package, once it was joined.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.ray: Any = None
        self._config = config
        self._lock = threading.Lock()
        self._joined = False
        self._left = False
        self._told: set[Future[None]] = set()
        self._until = 0.0

    def join(self) -> None:
        """Connects this process to it, if it is not connected yet.

        Raises:
            ConfigError: A setting is wrong.
            EngineDead: There is none.
        """
        if self._config.device.startswith("cuda:"):
            mend = "give 'auto' or 'cuda': which one a worker has is Ray's to say"
            raise ConfigError(f"device={self._config.device!r} with distributed_executor_backend='ray': {mend}")
        ray = import_ray()
        _session.enter(ray, self._config.ray_address, self._config.ray_reach_timeout_s)
        with self._lock:
            self.ray, self._joined = ray, not self._left
        if not self._joined:  # whoever waited for this was cancelled meanwhile
            _session.leave(ray)

    def tell(self, news: Callable[[], None]) -> Future[None]:
        """Has Ray told something, in a thread; it is not left before it knows, or has not answered in time."""
        told = apart(news)
        self._told.add(told)
        self._until = time.monotonic() + self.gone_s
        return told

    def leave(self) -> None:
        """Ends the connection, if no other engine needs it and the application has not made it. Idempotent.

        Ray takes five seconds for it when the cluster is gone; else it would soon end this process.
        """
        wait(self._told, max(self._until - time.monotonic(), 0.0))
        with self._lock:
            joined, self._joined, self._left = self._joined, False, True
        if joined:
            _session.leave(self.ray)

    def needs(self) -> dict[str, float]:
        """What a worker asks of its node: ``ray_resources``, or one CPU, and one GPU where there are some."""
        given = self._config.ray_resources
        if given is not None:
            return {name: float(amount) for name, amount in given.items()}
        gpu = self._config.device != "cpu" and (self._config.device == "cuda" or self.totals().get("GPU"))
        return {"CPU": 1.0, **({"GPU": 1.0} if gpu else {})}

    def totals(self) -> Mapping[str, float]:
        """What there is in all nodes."""
        return self.asked(self.ray.cluster_resources)

    def asked(self, question: Callable[..., T], *args: Any) -> T:
        """What Ray answers to one of its calls.

        Raises:
            EngineDead: It does not.
        """
        if self._left:
            raise EngineNotRunning("the engine was closed")
        try:
            return question(*args)
        except Exception as error:  # noqa: BLE001 - what Ray raises has no common base
            raise EngineDead(f"Ray does not answer: {_line(error)}") from None

    def shortage(self, rank: int, needs: Mapping[str, float]) -> str:
        """Why there is no place for a worker, and what to do about it."""
        nodes = [node for node in self.asked(self.ray.nodes) if node["Alive"]]
        totals, free = self.totals(), self.asked(self.ray.available_resources)
        there = ", ".join(f"{name} {totals.get(name, 0):g} ({free.get(name, 0):g} free)" for name in needs)
        asked = ", ".join(f"{name} {amount:g}" for name, amount in needs.items())
        count = "1 node has" if len(nodes) == 1 else f"{len(nodes)} nodes have"
        return (
            f"worker {rank} of data_parallel_size={self._config.data_parallel_size} has found no place within "
            f"ray_placement_timeout_s={self._config.ray_placement_timeout_s:g}: on one node it needs {asked}; the "
            f"cluster's {count} {there}; add nodes, ask for less (ray_resources, data_parallel_size), or wait longer"
        )

    @property
    def patience_s(self) -> int:
        """Whole seconds that a worker waits for its place, as Ray counts them."""
        return math.ceil(self._config.ray_placement_timeout_s)

    @property
    def gone_s(self) -> float:
        """Seconds that Ray may take to say that an actor is gone which it was told to end."""
        return min(self._config.ray_gone_timeout_s, LONGEST_S)


def _line(error: BaseException) -> str:
    """What an error says, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
