"""One worker as an executor of several sees it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from steploom.config import EngineConfig
from steploom.errors import EngineDead, EngineError, EngineNotRunning, ProtocolError, WorkerDied
from steploom.executor.channel import Channel
from steploom.executor.process import WorkerProcess
from steploom.executor.transport import WorkerSocket
from steploom.protocol import RequestReport
from steploom.threads import at_once
from steploom.worker.messages import Answer, Close, Command, Written
from steploom.worker.process import LAST_WORDS


class Worker:
    """One worker: its process, its socket, and the channel that they carry.

    Args:
        rank: Which worker.
        config: The engine's settings.
        process: Its process, not started yet.
        open_socket: Makes the socket to it, which hands on what arrives, and what cannot be read.
        device: The number of its device among those that it sees; None: its rank.
    """

    def __init__(
        self,
        rank: int,
        config: EngineConfig,
        process: WorkerProcess,
        open_socket: Callable[[Callable[[Answer], None], Callable[[ProtocolError], None]], WorkerSocket],
        device: int | None = None,
    ) -> None:
        self.rank = rank
        self.refused: dict[int, list[RequestReport]] = {}  # by the tick whose answer tells of them
        self._stop_s, self._last_words_s = config.process_stop_s, config.last_words_timeout_s
        self.channel = Channel(rank, config, self._send, device)
        self.process = process
        self.socket = open_socket(self.channel.receive, self._damaged)
        self.channel.write = self.socket.write

    def _send(self, command: Command | Written) -> None:
        try:
            self.socket.send(command)
        except EngineError:  # it hears nothing any more: most likely it is gone, which its exit is about to tell
            self.process.kill()
            # and if nothing tells it (a cluster that is gone cannot), nobody may wait for its answers for ever
            asyncio.get_running_loop().call_later(self._last_words_s, self._died)

    async def start(self) -> None:
        """Starts the process, which will connect to the socket.

        Raises:
            EngineError: It cannot be started; or it was stopped or given up meanwhile.
        """
        self.socket.watch(self._cut)
        await at_once(self.process.spawn)
        if self.channel.failure is not None:
            self.process.abandon()
            raise self.channel.failure()
        self.process.watch(self._exited)

    def welcome(self, packages: tuple[str, ...]) -> None:
        """It has loaded: dataclasses of ``packages`` may travel."""
        self.socket.packages = packages

    def _damaged(self, error: ProtocolError) -> None:
        message = f"worker {self.rank}: {error}"
        self.channel.fail(lambda: ProtocolError(message))
        self.process.kill()

    def _cut(self) -> None:
        """The connection has ended: with the process, of which we are told as well, or without."""
        asyncio.get_running_loop().call_later(self._last_words_s, self._cut_off)

    def _cut_off(self) -> None:
        if self.channel.failure is None and not self.process.exited.is_set():
            limit = self.socket.limit
            self._damaged(ProtocolError(f"a message beyond max_message_bytes={limit}, or none at all, was cut off"))

    def _exited(self) -> None:
        """The process is gone. If it left last words, they say more than its exit code."""
        if self.process.exitcode == LAST_WORDS:
            asyncio.get_running_loop().call_later(self._last_words_s, self._died)
        else:
            self._died()

    def _died(self) -> None:
        rank, exitcode, lines = self.rank, self.process.exitcode, self.process.last_lines
        self.channel.fail(lambda: WorkerDied(rank, exitcode, lines))

    def discard(self, fault: EngineError) -> None:
        """Kills it; whoever waits for it is told ``fault``."""
        kind, message = EngineDead if isinstance(fault, WorkerDied) else type(fault), str(fault)
        self.channel.fail(lambda: kind(message))
        self.process.kill()

    async def stop(self) -> None:
        """Ends it: in order if it can hear, else by force."""
        hears = self.channel.failure is None and self.channel.loaded
        if hears:
            with contextlib.suppress(EngineError):
                self.socket.send(Close())
        self.channel.fail(lambda: EngineNotRunning("the engine was closed"))
        await self.process.end(self._stop_s if hears else 0.0)

    def abandon(self) -> None:
        """Ends at once what is left of it."""
        self.process.abandon()
        self.socket.close()
