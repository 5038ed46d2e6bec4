"""The engine's end of the socket to one worker, in the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import Callable
from pathlib import Path

import zmq

from steploom import codec
from steploom.config import EngineConfig
from steploom.errors import EngineError, ProtocolError
from steploom.threads import OneThread
from steploom.worker.messages import Answer, Command, ToEngine, ToWorker, Written
from steploom.worker.process import rendezvous

LARGE = 1 << 16
"""Bytes of a message that take milliseconds to decode, if they are all numbers."""


class WorkerSocket:
    """A ZMQ socket served by the event loop's readers: no task.

    Messages that are small and without payload are decoded in the loop. Large ones, and those with tensors or images,
    are decoded in a thread of its own, one at a time and in order: the first image imports PIL, and a video takes tens
    of milliseconds. The loop's pool may be full of who waits for just these messages.

    Args:
        context: ZMQ's.
        address: Path of the socket, in a folder that only this user can enter.
        on_answer: Takes each message.
        on_damage: Is told when a message cannot be decoded.
        limit: Bytes of a message, at most.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        on_answer: Callable[[Answer], None],
        on_damage: Callable[[ProtocolError], None],
        limit: int = EngineConfig.max_message_bytes,
    ) -> None:
        self.limit = limit
        self.packages: tuple[str, ...] = codec.PACKAGES
        self._on_answer = on_answer
        self._on_damage = on_damage
        self._decoding = False
        self._decoder = OneThread("steploom-decode")
        self._monitor: zmq.Socket[bytes] | None = None
        self._address = address
        self._loop = asyncio.get_running_loop()
        self._socket = context.socket(zmq.PAIR)
        self._socket.linger = 0
        self._socket.maxmsgsize = limit  # of each part: what is beyond it is not even received
        self._open()
        self._fd = self._socket.fileno()
        self._loop.add_reader(self._fd, self._drain)

    def watch(self, on_cut: Callable[[], None]) -> None:
        """Has ``on_cut`` called when the connection with the worker has ended, for whatever reason."""
        self._monitored(zmq.EVENT_DISCONNECTED, lambda kind: on_cut())

    def _monitored(self, events: int, on_event: Callable[[int], None]) -> None:
        """Has ``on_event`` called with each of these that comes."""
        self._on_event = on_event
        self._monitor = self._socket.get_monitor_socket(events)
        self._loop.add_reader(self._monitor.fileno(), self._observe)
        self._loop.call_soon(self._observe)

    def _observe(self) -> None:
        """Takes in what has become of the connection."""
        while self._monitor is not None:
            try:
                event, _ = self._monitor.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._on_event(struct.unpack_from("=H", event)[0])

    def _unwatch(self) -> None:
        monitor, self._monitor = self._monitor, None
        if monitor is not None:
            self._loop.remove_reader(monitor.fileno())
            self._socket.disable_monitor()
            monitor.close()

    def _open(self) -> None:
        try:
            self._socket.bind(f"ipc://{self._address}")
        except zmq.ZMQError:
            self._socket.close()
            raise

    def write(self, command: Command) -> Written:
        """``command`` as it travels.

        Raises:
            InvalidRequest: Something in it cannot travel.
        """
        return codec.encode(ToWorker(command), packages=self.packages, limit=self.limit)

    def send(self, command: Command | Written) -> None:
        """Sends ``command`` without waiting.

        Raises:
            InvalidRequest: Something in it cannot travel; nothing was sent.
            EngineError: The worker takes nothing any more.
        """
        try:
            written = command if isinstance(command, list) else self.write(command)
            self._socket.send_multipart(written, zmq.NOBLOCK, copy=False)
        except zmq.Again:
            raise EngineError("the worker takes no messages any more") from None
        # ZMQ's descriptor tells of changes only, and sending may have swallowed the news of a message
        if int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        """Takes all messages that have arrived."""
        while not self._decoding and not self._socket.closed:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            buffers = [frame.buffer for frame in frames]
            if len(buffers) == 1 and buffers[0].nbytes < LARGE:
                self._deliver(self._decode(buffers))
            else:
                self._decode_beside(buffers)

    def _decode_beside(self, buffers: list[memoryview]) -> None:
        """Has the thread decode a message; here, where the system has no thread for that: late is better than never."""

        def decode() -> None:
            answer = self._decode(buffers)
            with contextlib.suppress(RuntimeError):  # the loop was closed before the engine
                self._loop.call_soon_threadsafe(self._resume, answer)

        try:
            self._decoder.run(decode)
            self._decoding = True
        except RuntimeError:
            self._deliver(self._decode(buffers))

    def _decode(self, buffers: list[memoryview]) -> Answer | ProtocolError:
        try:
            return codec.decode(buffers, ToEngine, packages=self.packages, limit=self.limit).answer
        except ProtocolError as error:
            return error
        except Exception as error:  # noqa: BLE001 - no memory, a broken Pillow: else everybody would wait for this message
            return ProtocolError(f"a message cannot be decoded: {type(error).__name__}: {error}")

    def _resume(self, answer: Answer | ProtocolError) -> None:
        self._decoding = False
        if not self._socket.closed:
            self._deliver(answer)
            self._drain()

    def _deliver(self, answer: Answer | ProtocolError) -> None:
        if isinstance(answer, ProtocolError):
            self._on_damage(answer)
        else:
            self._on_answer(answer)

    def close(self) -> None:
        """Stops listening, and removes the socket's file, which ZMQ leaves, and what a killed worker left beside it."""
        if not self._socket.closed:
            self._unwatch()
            self._loop.remove_reader(self._fd)
            self._socket.close()
            self._decoder.end(wait=not self._decoding)  # what is being decoded holds nobody up
            if self._address:
                for path in (Path(self._address), rendezvous(str(self._address))):
                    path.unlink(missing_ok=True)
