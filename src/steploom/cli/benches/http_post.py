"""One POST of JSON over HTTP/1.1, answered whole or line by line, on anyio alone.

A benchmark needs no more of HTTP than this, and every library that has more is somebody else's dependency: it changes
with theirs. Each request has a connection of its own, which its cancellation closes.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncGenerator, Mapping
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import anyio
from anyio.abc import ByteStream
from anyio.streams.buffered import BufferedByteReceiveStream

from steploom.errors import ConfigError, EngineError

MAX_LINE = 256 * 2**20
"""Bytes of a line, and of an answer's chunk, at most: an image in base64 is one line."""


class Address:
    """Where a server is.

    Args:
        url: ``http://host:port/prefix`` or ``https://...``; a ``/v1`` at its end may be there or not.

    Raises:
        ConfigError: It is no such address.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise ConfigError(f"url={url!r}: must be http://HOST:PORT or https://HOST:PORT")
        self.host, self.tls = parts.hostname, parts.scheme == "https"
        self.port = port or (443 if self.tls else 80)
        self.name = parts.netloc.rpartition("@")[2]
        self.prefix = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")


class Exchange:
    """A POST and its answer, as an async context manager; entering sends it, and reads the answer's head.

    Args:
        address: Of the server.
        path: After the address's prefix: ``/v1/images/generations``.
        body: What is sent, as JSON.
        headers: Besides those that HTTP wants.

    Attributes:
        status: Of the answer.
        headers: Of the answer, names in lower case.

    Raises:
        OSError: No connection.
        EngineError: On entering or reading: the answer is not HTTP/1.1, or ends too early.
    """

    def __init__(self, address: Address, path: str, body: Mapping[str, Any], headers: Mapping[str, str]) -> None:
        data = json.dumps(body).encode()
        lines = {
            "Host": address.name,
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            "Connection": "close",
            "User-Agent": "steploom-bench",
            **headers,
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self._data = f"POST {address.prefix}{path} HTTP/1.1\r\n{head}\r\n".encode() + data
        self._address = address
        self._stream: ByteStream | None = None
        self.status = 0
        self.headers: dict[str, str] = {}

    async def __aenter__(self) -> Self:
        where = self._address
        context = ssl.create_default_context() if where.tls else None
        if context is not None:
            self._stream = await anyio.connect_tcp(where.host, where.port, ssl_context=context)
        else:
            self._stream = await anyio.connect_tcp(where.host, where.port)
        try:
            self._reader = BufferedByteReceiveStream(self._stream)
            await self._stream.send(self._data)
            await self._read_head()
        except BaseException:
            await anyio.aclose_forcefully(self._stream)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._stream is not None:
            await anyio.aclose_forcefully(self._stream)

    async def whole(self) -> bytes:
        """The answer's body."""
        return b"".join([part async for part in self._parts()])

    async def lines(self) -> AsyncGenerator[bytes]:
        """The answer's body line by line, each as soon as it is there, without its end."""
        rest = bytearray()
        async for part in self._parts():
            rest += part
            *full, last = rest.split(b"\n") if b"\n" in part else [rest]
            for line in full:
                yield bytes(line).rstrip(b"\r")
            rest = last
        if rest:
            yield bytes(rest)

    async def _read_head(self) -> None:
        words = (await self._line()).split(maxsplit=2)
        if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
            raise EngineError(f"{self._address.name} does not answer as an HTTP server does; check --url")
        self.status = int(words[1])
        while line := await self._line():
            name, _, value = line.decode("latin-1").partition(":")
            self.headers[name.strip().lower()] = value.strip()

    async def _parts(self) -> AsyncGenerator[bytes]:
        """The body as it comes: in chunks, of a given length, or to the end of the connection."""
        if "chunked" in self.headers.get("transfer-encoding", "").lower():
            while size := int((await self._line()).partition(b";")[0] or b"0", 16):
                yield await self._exactly(min(size, MAX_LINE))
                await self._line()
            return
        length = self.headers.get("content-length")
        if length is not None:
            yield await self._exactly(min(int(length), MAX_LINE))
            return
        while True:
            try:
                yield await self._reader.receive()
            except anyio.EndOfStream:
                return

    async def _line(self) -> bytes:
        try:
            return await self._reader.receive_until(b"\r\n", 64 * 1024)
        except (anyio.IncompleteRead, anyio.DelimiterNotFound, anyio.BrokenResourceError) as error:
            raise self._cut() from error

    async def _exactly(self, count: int) -> bytes:
        try:
            return await self._reader.receive_exactly(count) if count else b""
        except (anyio.IncompleteRead, anyio.BrokenResourceError) as error:
            raise self._cut() from error

    def _cut(self) -> EngineError:
        return EngineError(f"{self._address.name} closed the connection before its answer was complete")
