"""AttachedExecutor: a worker process that somebody else has started, and that stays when the engine leaves."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from typing import ClassVar

import anyio

from steploom.errors import ConfigError, EngineDead, EngineError, WorkerDied
from steploom.executor.abstract import ProgressCallback
from steploom.executor.multiproc import MultiprocExecutor
from steploom.executor.process import WorkerProcess
from steploom.protocol import PipelineInfo
from steploom.worker.listening import FATAL, same_user
from steploom.worker.process import LAST_WORDS

FIRST_WAIT_S = 0.05
"""How long a worker that is gone is waited for before it is looked for again; then twice as long each time."""
LONGEST_WAIT_S = 1.0
"""But no longer than that."""


class NobodyListens(EngineDead):
    """No worker is at the address."""


class AttachedExecutor(MultiprocExecutor):
    """Executes ticks in a worker that was started as ``python -m steploom.worker --listen ADDRESS``.

    ::

        AsyncDiffusionEngine(model="demo", distributed_executor_backend=AttachedExecutor.at("/run/user/1000/worker"))

    Closing the engine leaves the worker running, without programs and with its model loaded: the next engine with the
    same configuration begins at once. A worker serves one engine at a time; others wait, up to ``start_timeout_s``. One
    that is lost (:class:`~steploom.errors.WorkerDied`) is attached to again once somebody has started it anew: an
    engine that is running waits as long for that.
    """

    address: ClassVar[str] = ""
    """Path of the socket where the worker listens."""

    @classmethod
    def at(cls, address: str | os.PathLike[str]) -> type[AttachedExecutor]:
        """The executor of the worker that listens at ``address``."""
        return type(cls.__name__, (cls,), {"address": os.fspath(address), "__module__": cls.__module__})

    async def _init_executor(self, on_progress: ProgressCallback) -> PipelineInfo:
        if not self.address:
            mend = "give AttachedExecutor.at(path)"
            raise ConfigError(f"distributed_executor_backend=AttachedExecutor: has no address; {mend}")
        if self.config.data_parallel_size != 1:
            raise ConfigError(f"data_parallel_size={self.config.data_parallel_size}: at an address is one worker")
        on_progress(f"attaching to the worker at {self.address}")
        return await super()._init_executor(on_progress)

    async def recover(self, worker: int = 0) -> None:
        """Attaches again, as soon as a worker listens there: waits for that up to ``start_timeout_s``.

        Raises:
            EngineDead: Nobody has started one; or it does not serve.
        """
        wait_s, deadline = FIRST_WAIT_S, anyio.current_time() + self.config.start_timeout_s
        dying = True  # the system may close the door of a process that was killed last: it opens once more, for nobody
        while True:
            try:
                return await super().recover(worker)
            except (NobodyListens, WorkerDied) as error:
                if anyio.current_time() >= deadline or (isinstance(error, WorkerDied) and not dying):
                    raise
            dying = False
            # Somebody else makes the socket, when they please. No system tells of that alike, and a worker that is
            # loading is not in a hurry: so it is looked for, ever more seldom, and no longer than a start may take.
            await anyio.sleep(min(wait_s, max(deadline - anyio.current_time(), 0)))
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)

    async def add_worker(self) -> None:
        """There is one worker at an address, and it is here already."""
        raise EngineError(f"AttachedExecutor has no way to add a worker: at {self.address} is one")

    def _process(self, rank: int, address: str, on_line: Callable[[str], None]) -> WorkerProcess:
        return _Elsewhere(rank, address, self.address)


class _Elsewhere(WorkerProcess):
    """A worker process that is not ours, seen through the connection to it: it is "gone" when that has ended.

    Args:
        rank: Which worker.
        address: Path of our socket, which it is to connect to.
        listens: Where it listens.
    """

    def __init__(self, rank: int, address: str, listens: str) -> None:
        super().__init__(rank, address, "", _nothing)
        self._listens = listens
        self._connection: socket.socket | None = None
        self._on_exit: Callable[[], None] = _no_one

    @property
    def last_lines(self) -> str:
        """What is known of its end."""
        return f"the worker at {self._listens} has hung up"

    def spawn(self) -> None:
        """Connects to it, and says where our socket is.

        Raises:
            NobodyListens: Nobody does, yet or any more.
            EngineDead: It cannot be spoken to, or belongs to another user.
        """
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.setblocking(False)  # a local socket takes so little at once, or says that it cannot
            connection.connect(self._listens)
            mine = same_user(connection)
            connection.sendall(f"{self._address}\t{self.max_message_bytes}\n".encode())
        except OSError as error:
            connection.close()
            start = f"python -m steploom.worker --listen {self._listens}"
            absent = isinstance(error, FileNotFoundError | ConnectionRefusedError)
            kind = NobodyListens if absent else EngineDead
            raise kind(f"no worker listens at {self._listens} ({error}); start it: {start}") from None
        if not mine:
            connection.close()
            raise EngineDead(f"the worker at {self._listens} belongs to another user")
        self._connection = connection

    def watch(self, on_exit: Callable[[], None]) -> None:
        """Begins to wait for the end of the connection."""
        assert self._connection is not None
        self._watched, self._on_exit = True, on_exit
        asyncio.get_running_loop().add_reader(self._connection.fileno(), self._heard)

    def _heard(self) -> None:
        assert self._connection is not None
        said = b""
        with contextlib.suppress(OSError):
            said = self._connection.recv(16)
        if said == FATAL:
            self.exitcode = LAST_WORDS  # the reason is on its way
            return
        self._hang_up()
        self._on_exit()

    def _hang_up(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        with contextlib.suppress(RuntimeError):
            asyncio.get_running_loop().remove_reader(connection.fileno())
        connection.close()
        self.exited.set()

    def kill(self) -> None:
        """Leaves it, at once: it is not ours to be killed. As with any other process, that is told as its exit."""
        if self._connection is not None:
            self._hang_up()
            if self._watched:  # once the caller is through: it may be about to wait for an answer
                asyncio.get_running_loop().call_soon(self._on_exit)

    def abandon(self) -> None:
        """Leaves it, at once."""
        self._hang_up()

    async def end(self, grace_s: float) -> None:
        """Returns when we have parted: when it has said so, else after ``grace_s``."""
        with anyio.move_on_after(grace_s):
            if self._connection is not None:
                await self.exited.wait()
        self._hang_up()


def _nothing(line: str) -> None:
    pass


def _no_one() -> None:
    pass
