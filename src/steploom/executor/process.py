"""One worker process as the engine's process sees it: started, watched, listened to, ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

import anyio

from steploom.config import EngineConfig, worker_environment
from steploom.errors import ConfigError

SOME = 4096
"""Bytes of its output that are read at once: mostly some fifty lines, whose logging takes about a millisecond."""
REST = 2**20
"""Bytes of its output that are read after its end; a pipe holds no more."""
LAST_LINES = 40
"""Lines of its output that are kept for :class:`~steploom.errors.WorkerDied`."""


class WorkerProcess:
    """A worker process. Its methods run in one event loop, except :meth:`spawn`.

    Args:
        rank: Which worker.
        address: Path of the socket that it is to connect to.
        runner: Name of its runner's factory.
        on_line: Is told each line that it prints.

    Attributes:
        exited: Set when it is gone and ``exitcode`` is known.
        exitcode: Minus the signal's number if a signal ended it.
        kill_timeout_s: Seconds that it may take after SIGTERM; then it is killed.
        max_message_bytes: Bytes of a message that it takes and sends, at most.
    """

    def __init__(self, rank: int, address: str, runner: str, on_line: Callable[[str], None]) -> None:
        self.rank = rank
        self.exited = anyio.Event()
        self.exitcode: int | None = None
        self.kill_timeout_s = EngineConfig.kill_timeout_s
        self.max_message_bytes = EngineConfig.max_message_bytes
        self._address = address
        self._runner = runner
        self._on_line = on_line
        self._lines: deque[str] = deque(maxlen=LAST_LINES)
        self._partial = b""
        self._process: subprocess.Popen[bytes] | None = None
        self._end_fd = -1
        self._watched = False
        self._unwanted = False
        self._spawning = threading.Lock()  # held for the milliseconds of a spawn, never across an await

    @property
    def last_lines(self) -> str:
        """What it printed last."""
        return "\n".join(self._lines)

    def spawn(self) -> None:
        """Starts the process; may be called in another thread than the loop's, since it takes milliseconds.

        It leads its own session: Ctrl-C in a terminal reaches the engine's process, which then ends the worker in
        order. It sees the same import path, so that a script's own modules can extend it.

        Raises:
            ConfigError: There is no interpreter to start it with.
        """
        if not sys.executable:
            raise ConfigError("distributed_executor_backend='mp': sys.executable is empty; use 'inproc'")
        environment = worker_environment()
        environment["PYTHONPATH"] = os.pathsep.join(_import_path())
        command = [sys.executable, "-P", "-m", "steploom.worker", self._address, "--runner", self._runner]
        command += ["--max-message-bytes", str(self.max_message_bytes)]
        with self._spawning:
            if not self._unwanted:  # else whoever asked for it was cancelled meanwhile, and nobody would end it
                self._popen(command, environment)

    def _popen(self, command: list[str], environment: dict[str, str]) -> None:
        alive: int | None = None
        if not hasattr(os, "pidfd_open"):
            self._end_fd, alive = os.pipe()
            command += ["--alive-fd", str(alive)]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                pass_fds=() if alive is None else (alive,),
            )
        finally:
            if alive is not None:
                os.close(alive)

    def watch(self, on_exit: Callable[[], None]) -> None:
        """Begins to listen to its output, and calls ``on_exit`` as soon as it has ended."""
        assert self._process is not None
        assert self._process.stdout is not None
        self._watched = True
        loop = asyncio.get_running_loop()
        output = self._process.stdout.fileno()
        os.set_blocking(output, False)
        loop.add_reader(output, self._read, output)
        if self._end_fd < 0:
            # not reaped yet, so the id is still its own, even if it has ended
            self._end_fd = os.pidfd_open(self._process.pid)
        loop.add_reader(self._end_fd, self._ended, loop, on_exit)

    def _read(self, output: int) -> None:
        """Takes some of what it has printed: the loop comes back for more, after whoever else is due."""
        with contextlib.suppress(BlockingIOError):
            if not self._take(output):
                asyncio.get_running_loop().remove_reader(output)

    def _take(self, output: int) -> bool:
        """Whether there was more to read, or may be."""
        chunk = os.read(output, SOME)
        *lines, self._partial = (self._partial + chunk).split(b"\n")
        for line in lines:
            self._hear(line)
        if len(self._partial) > 65536:
            self._partial = self._partial[-4096:]
        return bool(chunk)

    def _hear(self, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip().rpartition("\r")[2]  # of a progress bar its last state
        if text:
            self._lines.append(text)
            self._on_line(text)

    def _ended(self, loop: asyncio.AbstractEventLoop, on_exit: Callable[[], None]) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        loop.remove_reader(self._end_fd)
        os.close(self._end_fd)
        self._end_fd = -1
        # what it has started (compilers) ends with it; before it is reaped, so that the group's id is still its own
        self._signal(signal.SIGKILL)
        loop.remove_reader(self._process.stdout.fileno())
        self._finish(loop, REST // SOME, on_exit)

    def _finish(self, loop: asyncio.AbstractEventLoop, turns: int, on_exit: Callable[[], None]) -> None:
        """Takes what it printed last, in as many turns of the loop at most, and is done with it."""
        if self.exited.is_set():
            return
        assert self._process is not None
        assert self._process.stdout is not None
        assert self._process.stdin is not None
        with contextlib.suppress(BlockingIOError):
            if turns and self._take(self._process.stdout.fileno()):
                loop.call_soon(self._finish, loop, turns - 1, on_exit)
                return
        self._hear(self._partial)
        self.exitcode = self._process.wait()
        self._process.stdout.close()
        self._process.stdin.close()
        self.exited.set()
        on_exit()

    def _signal(self, number: signal.Signals) -> None:
        """Sends a signal to it and whatever it has started."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """Ends it at once."""
        if self._process is not None and not self.exited.is_set():
            self._signal(signal.SIGKILL)

    def abandon(self) -> None:
        """Ends it at once, without the event loop, and leaves nothing of it behind; from now on none is started."""
        with self._spawning:
            self._unwanted = True
        if self._process is None or self.exited.is_set():
            return
        self._signal(signal.SIGKILL)
        self.exitcode = self._process.wait()
        for stream in (self._process.stdout, self._process.stdin):
            if stream is not None:
                with contextlib.suppress(RuntimeError, ValueError):
                    asyncio.get_running_loop().remove_reader(stream.fileno())
                stream.close()
        if self._end_fd >= 0:
            with contextlib.suppress(RuntimeError):
                asyncio.get_running_loop().remove_reader(self._end_fd)
            os.close(self._end_fd)
        self.exited.set()

    async def end(self, grace_s: float) -> None:
        """Returns when it is gone: by itself within ``grace_s``, else by SIGTERM, else by SIGKILL."""
        if not self._watched:  # its start was cancelled: nobody would learn of its end
            self.abandon()
            return
        for seconds, number in ((grace_s, signal.SIGTERM), (self.kill_timeout_s, signal.SIGKILL)):
            with anyio.move_on_after(seconds):
                await self.exited.wait()
                return
            self._signal(number)
        await self.exited.wait()


def _import_path() -> list[str]:
    """What Python looks at of ``sys.path``: texts. An empty one is the working directory, if there is one."""
    try:
        here = [str(Path.cwd())]
    except FileNotFoundError:
        here = []
    given: list[object] = list(sys.path)
    return [text for path in given if isinstance(path, str) for text in ([path] if path else here)]
