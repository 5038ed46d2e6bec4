"""A worker on another machine: it listens for its engine over TCP, and lets in nobody else.

The messages are those of every worker. They are encrypted, and both sides know each other, by CURVE: the worker draws a
pair of keys for its one engine, which is told the public one by whoever has started the worker. Nobody can begin to
speak to it without that key, and it is never sent over the connection.
"""

from __future__ import annotations

import faulthandler
import os
from typing import NamedTuple

import zmq

from steploom.config import EngineConfig
from steploom.worker.memory import keep_freed
from steploom.worker.process import EngineLink, attend


class Door(NamedTuple):
    """Where a worker listens, as its engine is told."""

    url: str
    """``tcp://host:port``."""
    key: bytes
    """Its public key, which stays between the two."""
    pid: int


class SecretLink(EngineLink):
    """The worker's end of a socket over TCP, which listens.

    Args:
        host: The address of this machine where the engine will look for it.

    Attributes:
        door: Where it listens.
    """

    door: Door

    def _open(self, address: str) -> None:
        key, secret = zmq.curve_keypair()
        self._socket.curve_server = True
        self._socket.curve_publickey, self._socket.curve_secretkey = key, secret
        self._socket.ipv6 = ":" in address
        self._socket.bind(f"tcp://[{address}]:*" if ":" in address else f"tcp://{address}:*")
        url = self._socket.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(url, bytes)
        self.door = Door(url.rstrip(b"\0").decode(), key, os.getpid())


class RemoteWorker:
    """What a process becomes a worker by, wherever it was started: first :meth:`listen`, then :meth:`serve`."""

    def __init__(self) -> None:
        self._link: SecretLink | None = None

    def listen(self, host: str, limit: int = EngineConfig.max_message_bytes) -> Door:
        """Waits for an engine from now on, at this address of its machine; returns where.

        Messages may come to ``limit`` bytes.
        """
        faulthandler.enable()
        keep_freed()
        self._link = SecretLink(host, limit=limit)
        return self._link.door

    def serve(self, runner: str) -> int:
        """Serves one engine until it says so.

        Args:
            runner: Name of the factory of the runner.

        Returns:
            Exit code, as that of :func:`steploom.worker.process.run`.
        """
        assert self._link is not None
        return attend(self._link, runner)
