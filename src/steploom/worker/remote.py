"""A worker on another machine: it listens for its engine over TCP, and lets in nobody else.

The messages are those of every worker. They are encrypted, and both sides know each other, by CURVE: the worker draws a
pair of keys for its one engine, which is told the public one by whoever has started the worker. Nobody can begin to
speak to it without that key, and it is never sent over the connection.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import socket
import struct
from typing import NamedTuple

import zmq

from steploom.config import EngineConfig
from steploom.worker.memory import keep_freed
from steploom.worker.messages import Command
from steploom.worker.process import EngineLink, attend

_SO_ATTACH_FILTER = 26
"""Linux's; Python has no name for it."""


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
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._listener: socket.socket | None = socket.create_server((address, 0), family=family)
        self._listener.setblocking(False)
        self._socket.setsockopt(zmq.USE_FD, os.dup(self._listener.fileno()))  # which it closes
        self._socket.ipv6 = family == socket.AF_INET6
        host = f"[{address}]" if self._socket.ipv6 else address
        url = f"tcp://{host}:{self._listener.getsockname()[1]}"
        self._socket.bind(url)
        self.door = Door(url, key, os.getpid())

    def receive(self, *, wait: bool) -> Command | None:
        """The next command; see :meth:`EngineLink.receive`. Whoever sends one is the engine: nobody else is to come."""
        command = super().receive(wait=wait)
        if command is not None and self._listener is not None:
            with self._listener:
                _shut(self._listener)
            self._listener = None
        return command

    def close(self) -> None:
        """Delivers what was sent, then closes."""
        if self._listener is not None:
            self._listener.close()
        super().close()


def _shut(listener: socket.socket) -> None:
    """Has the system drop whatever comes to a socket that listens. What was accepted before goes on.

    It cannot be closed: ZMQ listens at it too, and ends its connections when it is told to stop that.
    """
    nothing = struct.pack("HBBI", 6, 0, 0, 0)  # of every packet keep no byte: BPF's RET
    code = ctypes.create_string_buffer(nothing, len(nothing))
    with contextlib.suppress(OSError):  # no Linux: ZMQ ends within half a minute who has no key
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", 1, ctypes.addressof(code)))


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
