"""Who may come in, with how much and how slowly: API keys, bodies, an id for each request. Bare ASGI."""

from __future__ import annotations

import hmac
from typing import Any

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from steploom.server.errors import ApiError, response_of
from steploom.server.places import route_path
from steploom.server.settings import ServerSettings

_PROTECTED = "/v1/"
_OPERATED = "/admin/"
_UNGUESSABLE = "/v1/images/stored/"
"""Whoever knows the name of an image that is kept may have it."""

_READING = ("GET", "HEAD", "OPTIONS")
_HARMLESS = "default-src 'none'; frame-ancestors 'none'"
"""What browsers may do with an answer that is no page: nothing."""

_DIGITS = 18
"""Of a length that is worth reading: Python refuses integers of thousands of them."""


def keys_of(path: str, settings: ServerSettings) -> tuple[str, ...]:
    """The keys of which ``path`` needs one; none: anybody may."""
    if path.startswith(_OPERATED):
        return settings.admin_keys
    return settings.api_keys if path.startswith(_PROTECTED) and not path.startswith(_UNGUESSABLE) else ()


class Gate:
    """Refuses requests without a key, and bodies that are too large, before anything is read.

    Args:
        app: What is behind it.
        settings: Keys and sizes.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        named = _Named(send, scope["steploom.request_id"])
        try:
            self._check(scope)
            bounded = _Bounded(receive, self._settings.max_body_bytes, self._settings.body_timeout_s)
            await self._app(scope, bounded, named)
        except ClientDisconnect:  # while its body was read: there is nobody to tell
            return
        except ApiError as error:
            if named.began:  # too late for another answer
                raise
            await response_of(error)(scope, receive, named)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        keys = keys_of(route_path(scope), self._settings)
        if keys and scope["method"] != "OPTIONS":
            self._check_key(keys, headers.get("authorization", ""))
        self._check_page(scope["method"], headers)
        length = headers.get("content-length", "")
        if length.isdecimal() and (len(length) > _DIGITS or int(length) > self._settings.max_body_bytes):
            raise _too_large(self._settings.max_body_bytes)

    def _check_page(self, method: str, headers: Headers) -> None:
        """A form of somebody else's page may post to us without asking: CORS alone only hides the answer from it."""
        origin = headers.get("origin", "")
        site = headers.get("sec-fetch-site") or _site(origin, headers.get("host", ""))
        allowed = {"*", origin} & set(self._settings.cors_origins)
        if method not in _READING and site in ("cross-site", "same-site") and not allowed:
            raise ApiError(403, f"origin {origin!r:.80}: pages of it may not use this server (see cors_origins)",
                           code="origin_not_allowed")  # fmt: skip

    def _check_key(self, keys: tuple[str, ...], authorization: str) -> None:
        """In constant time: how long it takes says nothing about the keys."""
        scheme, _, given = authorization.partition(" ")
        found = False
        for key in keys:
            found |= hmac.compare_digest(given.strip().encode("latin-1"), key.encode())
        if scheme.lower() != "bearer" or not found:
            said = "is wrong" if authorization else "is missing"
            raise ApiError(401, f"the API key {said}; send it as 'Authorization: Bearer KEY'", code="invalid_api_key")


def _site(origin: str, host: str) -> str | None:
    """What ``Sec-Fetch-Site`` would say: browsers send it to HTTPS and to their own machine only, ``Origin`` always."""
    if not origin:
        return None  # no browser
    scheme, _, given = origin.lower().partition("://")
    port = {"http": ":80", "https": ":443"}.get(scheme, "")
    return "same-origin" if given and given == host.lower().removesuffix(port) else "cross-site"


class _Bounded:
    """``receive`` that gives no more than so many bytes of a body, and no longer than so many seconds."""

    def __init__(self, receive: Receive, most: int, timeout_s: float) -> None:
        self._receive, self._most, self._left = receive, most, most
        self._timeout_s, self._deadline = timeout_s, anyio.current_time() + timeout_s
        self._whole = False

    async def __call__(self) -> Message:
        if self._whole:
            return await self._receive()
        with anyio.CancelScope(deadline=self._deadline):
            message = await self._receive()
            if message["type"] == "http.request":
                self._whole = not message.get("more_body", False)
                self._left -= len(message.get("body", b""))
                if self._left < 0:
                    raise _too_large(self._most)
            return message
        raise ApiError(408, f"the body has not arrived in {self._timeout_s:g} seconds", code="request_timeout",
                       headers={"Connection": "close"})  # fmt: skip


class _Named:
    """``send`` that adds the id of the request, and remembers whether it began."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._id = request_id
        self.began = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.began = True
            started: dict[str, Any] = {**message, "headers": list(message.get("headers", []))}
            headers = MutableHeaders(raw=started["headers"])
            headers["x-request-id"] = self._id
            headers.setdefault("x-content-type-options", "nosniff")
            headers.setdefault("referrer-policy", "no-referrer")
            if not headers.get("content-type", "").startswith("text/html"):  # a page has a policy of its own
                headers.setdefault("content-security-policy", _HARMLESS)
            message = started
        await self._send(message)


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is larger than {most} bytes", code="request_too_large")
