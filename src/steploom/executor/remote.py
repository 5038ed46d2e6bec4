"""The engine's end of the socket to a worker on another machine."""

from __future__ import annotations

from collections.abc import Callable

import anyio
import zmq

from steploom.config import EngineConfig
from steploom.errors import EngineDead, ProtocolError
from steploom.executor.transport import WorkerSocket
from steploom.worker.messages import Answer
from steploom.worker.remote import Door

BEATS = 5
"""How often ZMQ asks whether the other machine is there, in the time for which that may be silent."""
LONGEST_MS = 2**31 - 1
"""What ZMQ's times go up to."""
NEVER_MS = 24 * 3600 * 1000
"""When ZMQ would connect again. (Told not to at all, it drops what has arrived and was not read yet.)"""

_LOST = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
)


class RemoteSocket(WorkerSocket):
    """A socket to a worker that listens, known by its key. What was lost is not connected again: messages are missing.

    Args:
        context: ZMQ's.
        on_answer: Takes each message.
        on_damage: Is told when a message cannot be decoded.
        config: The engine's settings.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        on_answer: Callable[[Answer], None],
        on_damage: Callable[[ProtocolError], None],
        *,
        config: EngineConfig,
    ) -> None:
        self._config = config
        super().__init__(context, "", on_answer, on_damage, config.max_message_bytes)
        self._on_lost: Callable[[], None] = _no_one
        self._settled = anyio.Event()
        self._reached = False

    def _open(self) -> None:
        self._socket.curve_publickey, self._socket.curve_secretkey = zmq.curve_keypair()
        silence_ms = max(int(min(self._config.ray_silence_timeout_s * 1000, LONGEST_MS)), BEATS)
        self._socket.heartbeat_ivl, self._socket.heartbeat_timeout = silence_ms // BEATS, silence_ms
        self._socket.reconnect_ivl = NEVER_MS

    async def connect(self, door: Door, on_lost: Callable[[], None]) -> None:
        """Connects to the worker; ``on_lost`` is called once the connection has ended, after what came before that.

        Raises:
            EngineDead: It cannot be reached, or has another key.
        """
        self._on_lost = on_lost
        self._monitored(zmq.EVENT_HANDSHAKE_SUCCEEDED | _LOST, self._became)
        self._socket.ipv6 = "[" in door.url
        self._socket.curve_serverkey = door.key
        self._socket.connect(door.url)
        with anyio.move_on_after(self._config.ray_reach_timeout_s):
            await self._settled.wait()
        if not self._reached:
            raise EngineDead(
                f"the worker at {door.url} cannot be reached from here; every machine of the engine must be able to "
                "connect to every port of the workers' machines (firewalls, network policies)"
            )

    def _became(self, kind: int) -> None:
        """What has become of the connection."""
        self._reached = kind == zmq.EVENT_HANDSHAKE_SUCCEEDED
        self._settled.set()
        if not self._reached:
            self._unwatch()
            self._drain()  # what was said before the end
            self._on_lost()


def _no_one() -> None:
    pass
