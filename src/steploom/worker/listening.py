"""A worker process that somebody else has started: it waits for engines, serves one after another, and outlives them.

``python -m steploom.worker --listen ADDRESS``. The address is a local socket that only this user can use. An engine
connects to it and says where its own socket is; from then on they speak as always. The connection stays open and
silent: each side knows from its end that the other one is gone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import select
import socket
import struct
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

from steploom.config import LONGEST_S, EngineConfig
from steploom.errors import ConfigError, ProtocolError
from steploom.worker.agenda import Agenda
from steploom.worker.memory import still
from steploom.worker.messages import Progress
from steploom.worker.process import EngineGone, EngineLink, greet, obey_all, remove
from steploom.worker.serving import RunnerLike, fatal, runner_factory

log = logging.getLogger(__name__)

GREET_S = 5.0
"""Seconds in which an engine that has connected must have said where its socket is."""
LONGEST = 4096
"""Bytes of that, and of what a message may come to, at most."""
LIMITS = range(2**20, 2**63)
"""What a message may come to: from the least that an engine's settings take to the most that a socket takes."""
WAITING = 64
"""Engines that may wait for their turn."""
LAST_BREATH_S = 1.0
"""Seconds that a killed engine's process may take to end after its connection has."""
_ENDED = -1
"""In place of a descriptor of a process that is gone."""
_PRIVATE = re.compile(r"/steploom-[^/]*/worker-\d+$")
FATAL = b"!"
"""Said on the connection before its end, if the worker has said over the socket why it does not serve."""


def listen(address: str, runner: str, greet_s: float = GREET_S) -> None:
    """Serves the engines that attach at ``address``, one at a time, until an exception (a signal's) ends it.

    Args:
        address: Path of the socket to listen at.
        runner: Name of the factory of the runner.
        greet_s: Seconds in which an engine that has connected must have said where its socket is.

    Raises:
        ConfigError: It cannot listen there.
    """
    keeper = Keeper(runner)
    with door(address) as listener:
        print(f"steploom worker {os.getpid()} listens at {address}", flush=True)  # noqa: T201 - for whoever started it
        try:
            while True:
                connection, _ = listener.accept()
                with connection:
                    _attend(connection, keeper, min(greet_s, LONGEST_S))
        finally:
            keeper.close()


@contextlib.contextmanager
def door(address: str) -> Generator[socket.socket]:
    """A socket that listens at ``address`` for this user alone; removed at the end.

    Raises:
        ConfigError: It cannot.
    """
    path = Path(address)
    with socket.socket(socket.AF_UNIX) as listener:
        _bind(listener, path)
        try:
            listener.listen(WAITING)
            yield listener
        finally:
            path.unlink(missing_ok=True)


def _bind(listener: socket.socket, path: Path) -> None:
    before = os.umask(0o177)  # from its first moment on nobody else can connect
    try:
        if path.is_socket() and not _answers(path):
            path.unlink()  # of a worker that was killed
        listener.bind(str(path))
    except OSError as error:
        raise ConfigError(f"--listen {path}: {error}; give a path that is free, in a folder of yours") from None
    finally:
        os.umask(before)


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as other:
        other.setblocking(False)  # no local socket keeps one waiting that does not ask to
        try:
            other.connect(str(path))
        except ConnectionRefusedError:
            return False
        return True


def same_user(connection: socket.socket) -> bool:
    """Whether the other side is this user, as far as the system tells; else the socket's mode has to do."""
    option: int | None = getattr(socket, "SO_PEERCRED", None)
    if option is None:
        return True
    _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, option, struct.calcsize("3i")))
    return user == os.getuid()


def _attend(connection: socket.socket, keeper: Keeper, greet_s: float) -> None:
    """Serves the engine that has connected; one that says nothing sensible, or has left, is let go.

    Whatever goes wrong with one engine ends here: the model that is loaded is the next one's, too.
    """
    try:
        _serve(connection, keeper, greet_s)
    except Exception:
        log.exception("an engine that has connected is let go")


def _serve(connection: socket.socket, keeper: Keeper, greet_s: float) -> None:
    said = _hear(connection, greet_s)
    if said is None or not same_user(connection):
        return
    address, limit = said
    link = EngineLink(address, connection.fileno(), limit)
    engine: int | None = None
    refused = gone = False
    try:
        engine = _process(connection)
        keeper.serve(link)
    except EngineGone:
        gone = True
    except Exception as error:  # noqa: BLE001 - it hears of it
        refused = True
        link.send(fatal(error))
    finally:
        link.close()
        if gone and _ends(engine, address):
            remove(address)
        if engine is not None and engine != _ENDED:
            os.close(engine)
    if refused:
        with contextlib.suppress(OSError):
            connection.send(FATAL)


def _process(connection: socket.socket) -> int | None:
    """A descriptor of the process at the other side, readable when it has ended; None where nobody can tell.

    One that waited for its turn may be gone already. One of another container, of which there is no number here, has 0.
    """
    option: int | None = getattr(socket, "SO_PEERCRED", None)
    if option is None or not hasattr(os, "pidfd_open"):
        return None
    process, _, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, option, struct.calcsize("3i")))
    try:
        return os.pidfd_open(process)
    except ProcessLookupError:
        return _ENDED
    except (OSError, ValueError):
        return None


def _ends(engine: int | None, address: str) -> bool:
    """Whether an engine that has hung up was killed, and left its socket in a private folder of its own.

    One that lives has taken its socket away, or is about to, and needs the folder for the next.
    """
    path = Path(address)
    if engine is None or not (path.is_socket() and _PRIVATE.search(address)):
        return False
    if engine == _ENDED:
        return True
    end = select.poll()
    end.register(engine, select.POLLIN)
    return bool(end.poll(1000 * LAST_BREATH_S))


def _hear(connection: socket.socket, greet_s: float) -> tuple[str, int] | None:
    """Where the engine's socket is, and how many bytes a message may have; None if it is too late, or nonsense."""
    said, until = b"", time.monotonic() + greet_s
    try:
        while not said.endswith(b"\n") and len(said) < LONGEST:
            if (left_s := until - time.monotonic()) <= 0:  # of all of it: others wait meanwhile
                return None
            connection.settimeout(left_s)
            part = connection.recv(LONGEST - len(said))
            if not part:
                return None
            said += part
        connection.settimeout(None)
        address, _, number = said.decode().strip().partition("\t")
        limit = int(number or EngineConfig.max_message_bytes)
        return (address, limit) if limit in LIMITS and Path(address).is_socket() else None
    except (OSError, ValueError):
        return None


class Keeper:
    """Keeps the runner, and with it the loaded model, from one engine to the next.

    An engine with the same configuration finds it as it is. One with another configuration has it loaded anew.

    Args:
        runner: Name of the factory of the runner.
    """

    def __init__(self, runner: str) -> None:
        self._name = runner
        self._runner: RunnerLike | None = None
        self._config: dict[str, Any] = {}
        self._link: EngineLink | None = None

    def serve(self, link: EngineLink) -> None:
        """Serves one engine until it says that it leaves.

        Raises:
            EngineGone: It has hung up.
            Exception: The model cannot be loaded, or the engine speaks nonsense.
        """
        configure = greet(link)
        if configure is None:
            return
        self._link = link
        agenda = Agenda(configure.restore().resident_limit)
        runner = self._made(configure.config) if self._runner is None else self._fitting(configure.config)
        try:
            obey_all(link, runner, agenda)
        except (EngineGone, ProtocolError):
            self._unwind(runner, agenda)
            raise
        except BaseException:
            self.close()
            raise
        else:
            self._unwind(runner, agenda)
        finally:
            self._link = None

    def _fitting(self, config: dict[str, Any]) -> RunnerLike:
        """The runner that is there, if it is what the engine asks for; else a new one."""
        assert self._runner is not None
        if config == self._config:
            self._runner.call("wake_up", (), {})  # where the engine before has left it asleep
            return self._runner
        self.close()
        return self._made(config)

    def _made(self, config: dict[str, Any]) -> RunnerLike:
        self._runner = runner_factory(self._name)(EngineConfig(**config), self._tell)
        self._config = config
        still.freeze()
        return self._runner

    def _tell(self, line: str) -> None:
        """A line of progress, to the engine that is there now; if it is gone, what is loaded is the next one's."""
        if self._link is not None:
            with contextlib.suppress(EngineGone):
                self._link.send(Progress(line))

    def _unwind(self, runner: RunnerLike, agenda: Agenda) -> None:
        """Ends all programs of an engine that has left; a runner that cannot is no use any more."""
        try:
            runner.execute(agenda.forget_all())
        except Exception:  # the boundary of the engine that has left: recorded, and the next one gets a new runner
            log.exception("what an engine has left behind cannot be unwound: the model is loaded anew for the next one")
            self.close()

    def close(self) -> None:
        """Unwinds everything, and lets go of the model."""
        runner, self._runner = self._runner, None
        if runner is not None:
            runner.close()
            still.thaw()
