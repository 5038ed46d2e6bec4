"""The worker process: one thread that owns the device and serves one engine over one socket.

Started as ``python -m steploom.worker`` by :class:`steploom.executor.MultiprocExecutor`. Its standard input is a pipe
that the engine's process holds open and never writes to: its end is the end of the engine.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import threading
import time
from pathlib import Path

import msgspec
import zmq

from steploom import codec
from steploom.config import LONGEST_S, EngineConfig
from steploom.errors import InvalidRequest, ProtocolError
from steploom.protocol import RequestReport
from steploom.worker.agenda import Agenda
from steploom.worker.gaps import Gaps
from steploom.worker.memory import still
from steploom.worker.messages import (
    Answer,
    Close,
    Command,
    Configure,
    Hello,
    Progress,
    Ready,
    Ticked,
    ToEngine,
    ToWorker,
)
from steploom.worker.ranks.group import Group, packages_of
from steploom.worker.serving import Forget, Inbox, Obedience, RunnerLike, describe, fatal, refusal, runner_factory

LAST_WORDS = 70
"""Exit code of a worker that has said why it ends."""


PR_SET_PDEATHSIG = 1
"""As in ``linux/prctl.h``: which signal the end of the parent sends."""


class EngineGone(Exception):
    """The engine has hung up: nobody says what to do any more, and nobody waits for answers."""


class EngineLink:
    """The worker's end of the socket.

    Args:
        address: Path of the engine's socket.
        lifeline: Descriptor that becomes readable when the engine is gone, if the worker is to outlive it.
        limit: Bytes of a message, at most.

    Attributes:
        packages: Dataclasses of these may travel.
        address: As given.
    """

    def __init__(self, address: str, lifeline: int | None = None, limit: int = EngineConfig.max_message_bytes) -> None:
        self.limit = limit
        self.packages: tuple[str, ...] = codec.PACKAGES
        self.address = address
        self._lifeline = lifeline
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self.wait_for_last_words(EngineConfig.last_words_timeout_s)  # until the engine says for how long
        self._socket.maxmsgsize = limit  # of each part: what is beyond it is not even received
        self._open(address)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        if lifeline is not None:
            self._poller.register(lifeline, zmq.POLLIN)

    def wait_for_last_words(self, seconds: float) -> None:
        """Has :meth:`close` wait until what was sent has left: twice as long as the engine then waits for it."""
        self._socket.linger = int(2000 * min(seconds, LONGEST_S))

    def _open(self, address: str) -> None:
        self._socket.connect(f"ipc://{address}")

    def send(self, answer: Answer) -> None:
        """Sends ``answer``.

        Raises:
            InvalidRequest: Something in it cannot travel; nothing was sent.
            EngineGone: Nobody takes it, and nobody ever will.
        """
        frames = codec.encode(ToEngine(answer), packages=self.packages, limit=self.limit)
        if self._lifeline is not None:
            self._wait_for_room(self._lifeline)
        self._socket.send_multipart(frames, copy=False)

    def _wait_for_room(self, lifeline: int) -> None:
        """Returns when a message can be sent: ZMQ keeps so many for an engine that may come back, and then waits."""
        room = zmq.Poller()
        room.register(self._socket, zmq.POLLOUT)
        room.register(lifeline, zmq.POLLIN)
        if self._socket not in dict(room.poll()):
            self._socket.linger = 0
            raise EngineGone

    def receive(self, *, wait: bool) -> Command | None:
        """The next command; without ``wait`` None if none has arrived.

        Raises:
            ProtocolError: It is none.
            EngineGone: None will ever come.
        """
        if wait and self._lifeline is not None:
            ready = dict(self._poller.poll())
            if self._socket not in ready:
                self._socket.linger = 0
                raise EngineGone
        try:
            frames = self._socket.recv_multipart(0 if wait else zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return None
        buffers = [frame.buffer for frame in frames]
        return codec.decode(buffers, ToWorker, packages=self.packages, limit=self.limit).command

    def close(self) -> None:
        """Delivers what was sent, then closes."""
        self._socket.close()
        self._context.term()


def run(address: str, runner: str, limit: int) -> int:
    """Serves the engine behind ``address`` until it says so.

    Args:
        address: Path of its socket.
        runner: Name of the factory of the runner.
        limit: Bytes of a message, at most.

    Returns:
        Exit code: 0 if told to close, :data:`LAST_WORDS` if it failed and said so.
    """
    return attend(EngineLink(address, limit=limit), runner)


def attend(link: EngineLink, runner: str) -> int:
    """Serves the engine at the other end of ``link`` until it says so; the exit code, as that of :func:`run`."""
    try:
        _serve(link, runner)
    except Exception as error:  # noqa: BLE001 - the process boundary: the engine hears of it
        link.send(fatal(error))
        return LAST_WORDS
    finally:
        link.close()
    return 0


def _serve(link: EngineLink, runner_name: str) -> None:
    configure = greet(link)
    if configure is None:
        return
    config = configure.restore()

    def tell(line: str) -> None:
        link.send(Progress(line))

    if config.ranks == 1:
        runner = runner_factory(runner_name)(config, tell)
    else:
        runner = Group(str(rendezvous(link.address)), runner_name, config, tell)
    try:
        still.freeze()
        obey_all(link, runner, Agenda(config.resident_limit))
    finally:
        runner.close()


def greet(link: EngineLink) -> Configure | None:
    """Says hello; what the engine configures then, or None if it has changed its mind.

    Raises:
        ProtocolError: It says something else.
        ConfigError: What it configures is out of range.
    """
    link.send(Hello())
    configure = link.receive(wait=True)
    if configure is None or isinstance(configure, Close):
        return None
    if not isinstance(configure, Configure):
        raise ProtocolError(f"a worker is to be configured first, but got {type(configure).__name__}")
    link.wait_for_last_words(configure.restore().last_words_timeout_s)
    return configure


def obey_all(link: EngineLink, runner: RunnerLike, agenda: Agenda) -> None:
    """Serves the engine with a runner that has loaded, until it says :class:`Close`.

    Raises:
        EngineGone: It has hung up instead.
    """
    link.packages = packages_of(runner)
    link.send(Ready(runner.info, list(link.packages)))
    gaps = Gaps()
    inbox, obedience = Inbox(agenda), Obedience(runner, agenda, gaps)
    while True:
        while (arrived := link.receive(wait=False)) is not None:
            inbox.put(arrived)
        if inbox.empty:
            _wait(link, inbox, gaps)
            continue
        command = inbox.next()
        if isinstance(command, Close):
            return
        answer = obedience.obey(command)
        try:
            if answer is not None:
                link.send(answer)
        except InvalidRequest as error:
            assert not isinstance(command, Forget)
            link.send(_fit(answer, link) if isinstance(answer, Ticked) else refusal(command, error))


def _wait(link: EngineLink, inbox: Inbox, gaps: Gaps) -> None:
    """Waits for the next command."""
    since = time.perf_counter()
    arrived = link.receive(wait=True)
    gaps.waited(since)
    assert arrived is not None
    inbox.put(arrived)


def _fit(answer: Ticked, link: EngineLink) -> Ticked:
    """``answer`` with a failure in place of each report that cannot travel: the other requests are not to blame."""
    assert answer.output is not None
    reports: list[RequestReport] = []
    room = codec.Room(link.limit, len(answer.output.reports))
    for report in answer.output.reports:
        try:
            room.take(codec.encode(report, packages=link.packages))
            reports.append(report)
        except InvalidRequest as error:
            reports.append(RequestReport(run_id=report.run_id, phase="done", finished=True, error=describe(error)))
    return Ticked(answer.tick, msgspec.structs.replace(answer.output, reports=reports))


def end_with_engine(address: str | None) -> None:
    """Starts the thread that ends this process, and all that it started, when the process that started it is gone.

    It blocks until standard input ends. Where the system has pidfds it also waits for the parent itself, since a fork
    of the parent may hold the pipe. Standard input is moved away, so that nobody else reads it.

    Args:
        address: Path of the engine's socket, removed with its folder since the engine no longer can; None for a rank
            that another one has started.
    """
    lifeline = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    ends = select.poll()
    ends.register(lifeline, select.POLLIN | select.POLLHUP)
    if hasattr(os, "pidfd_open"):
        with contextlib.suppress(OSError):  # an old kernel; or the parent is gone already, which the pipe tells
            ends.register(os.pidfd_open(os.getppid()), select.POLLIN)
    _continue_at_parents_end()

    def watch() -> None:
        ends.poll()
        if address is not None:
            remove(address)
        if os.getpgrp() == os.getpid():
            os.killpg(os.getpid(), signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, name="steploom-lifeline", daemon=True).start()


def _continue_at_parents_end() -> None:
    """Has the system continue this process when its parent ends: while it is stopped it would not see that, and stay.

    Linux only. A process that runs is not disturbed: so it does not matter that the system does it as well when only
    the thread ends that has started this one.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGCONT), 0, 0, 0)


def rendezvous(address: str) -> Path:
    """Where the ranks of the worker whose engine is behind ``address`` find each other, if it has several."""
    return Path(f"{address}.ranks")


def remove(address: str) -> None:
    """Removes the socket and, with the last of them, the folder that holds it."""
    socket = Path(address)
    for path in (socket, rendezvous(address)):
        with contextlib.suppress(OSError):
            path.unlink()
    with contextlib.suppress(OSError):
        socket.parent.rmdir()
