"""Where ``steploom serve`` listens: addresses, unix sockets, TLS, and what a connection may cost."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import os
import socket
import ssl
import stat
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from steploom.errors import ConfigError

BACKLOG = 2048

_SPARE_FILES = 256
"""Files and sockets that a server needs beside its clients' connections."""


@contextlib.contextmanager
def listening(options: argparse.Namespace) -> Generator[list[socket.socket]]:
    """The sockets that ``options`` ask for, bound and closed at the end; a unix socket's file is then removed.

    Raises:
        ConfigError: Another program listens there, or the address is none of this machine's.
    """
    if options.uds is not None:
        path = Path(options.uds)
        sock = _unix(path, int(options.uds_mode, 8))
        mine = path.stat().st_ino
        try:
            yield [sock]
        finally:
            sock.close()
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_ino == mine:  # not that of a server which has taken its place
                    path.unlink()
        return
    sockets = _internet(options.host, options.port)
    try:
        yield sockets
    finally:
        for sock in sockets:
            sock.close()


def _unix(path: Path, mode: int) -> socket.socket:
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.stat().st_mode):
            raise ConfigError(f"--uds {path}: is a file, no socket; give another place, or remove it")
        _refuse_if_used(path)
        path.unlink()  # a server that was killed has left it
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o777 & ~mode)  # nobody else may connect, not even for a moment
    try:
        sock.bind(str(path))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        why = error.strerror or str(error)
        raise ConfigError(f"--uds {path}: cannot listen there: {why}; give a place in a folder that exists") from None
    finally:
        os.umask(before)
    return sock


def _refuse_if_used(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return
        except OSError as error:
            raise ConfigError(f"--uds {path}: is there, and cannot be asked: {error}; give another place") from None
    raise ConfigError(f"--uds {path}: another program listens there; end it, or give another place")


def _internet(host: str, port: int) -> list[socket.socket]:
    """A socket for each address of ``host``; all have the same port, also where that is a free one."""
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host {host}: is no address: {error}; give one of this machine's, or 0.0.0.0") from None
    sockets: list[socket.socket] = []
    try:
        for family, address in dict.fromkeys((family, address[:2]) for family, _, _, _, address in found):
            where = (str(address[0]), sockets[0].getsockname()[1] if sockets else port)
            sockets.append(_bound(family, where))
    except OSError as error:
        for sock in sockets:
            sock.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"--port {port}: another program listens there ({host}); end it, or give another (0 takes a free one)"
            ) from None
        if error.errno == errno.EACCES:
            raise ConfigError(f"--port {port}: is not for this user; give one from 1024 on") from None
        why = error.strerror or str(error)
        raise ConfigError(f"--host {host}: cannot listen there: {why}; give an address of this machine") from None
    return sockets


def _bound(family: int, where: tuple[str, int]) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if sys.platform != "win32":  # where it would let two servers have one port
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(where)
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def address_of(options: argparse.Namespace, sockets: list[socket.socket]) -> str:
    """Where clients find the server."""
    if options.uds is not None:
        return str(options.uds)
    host, port = sockets[0].getsockname()[:2]
    return f"{'https' if options.ssl_certfile else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


def check_tls(options: argparse.Namespace) -> None:
    """Checks certificate and key before anything is loaded.

    Raises:
        ConfigError: One is missing, cannot be read, or they do not belong together.
    """
    certificate: str | None = options.ssl_certfile
    key: str | None = options.ssl_keyfile
    if not certificate and not key:
        return
    for name, value, other in (("keyfile", key, "certfile"), ("certfile", certificate, "keyfile")):
        if not value:
            raise ConfigError(f"--ssl-{other}: needs --ssl-{name}; give both, or neither for HTTP")
        try:
            Path(value).read_bytes()
        except OSError as error:
            raise ConfigError(f"--ssl-{name} {value}: cannot be read: {error.strerror}; give a PEM file") from None
    assert certificate
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=_no_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(f"--ssl-keyfile {key}: does not belong to --ssl-certfile {certificate}") from None
        raise ConfigError(
            f"--ssl-certfile {certificate}, --ssl-keyfile {key}: are no certificate and its key: "
            f"{error.reason or error}; give PEM files, the key without a password"
        ) from None


def _no_password() -> str:
    """Instead of asking at the terminal."""
    return ""


def allow_connections(most: int) -> int:
    """Raises this process's own limit of open files, as far as it may, and returns how many connections fit."""
    if sys.platform == "win32":
        return most
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most + _SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return most if soft == resource.RLIM_INFINITY else max(1, min(most, soft - _SPARE_FILES))


def protocol(max_connections: int, head_s: float) -> Any:
    """The protocol of uvicorn, for at most so many connections, each of which must say in time what it wants.

    The head of a request must arrive within ``head_s`` seconds, from the connection's beginning or the request's first
    byte; uvicorn itself waits for it forever.
    """
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    base: Any = AutoHTTPProtocol

    class Protocol(base):
        """One connection."""

        _late: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            base.connection_made(self, transport)
            if len(self.connections) > max_connections:
                transport.abort()
                return
            self._wait()

        def data_received(self, data: bytes) -> None:
            if self._idle() and self._late is None:
                self._wait()
            base.data_received(self, data)
            if self._late is not None and not self._idle():
                self._wait_no_more()

        def connection_lost(self, exc: Exception | None) -> None:
            self._wait_no_more()
            base.connection_lost(self, exc)

        def _idle(self) -> bool:
            return self.cycle is None or self.cycle.response_complete

        def _wait(self) -> None:
            close: Callable[[], None] = self.transport.close
            self._late = self.loop.call_later(head_s, close)

        def _wait_no_more(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

    return Protocol
