"""Errors as the OpenAI API says them: ``{"error": {"message", "type", "param", "code"}}``, never a traceback."""

from __future__ import annotations

import logging
import math
import re
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match, Route

from steploom.errors import DeadlineExceeded, EngineError, GenerationFailed, InvalidRequest, QueueFull, SteploomError

log = logging.getLogger(__name__)

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CODES = {
    "QueueFull": "queue_full",
    "DeadlineExceeded": "deadline_exceeded",
    "RequestCancelled": "request_cancelled",
    "GenerationFailed": "generation_failed",
    "InvalidRequest": "invalid_value",
}
RETRY_AFTER_S = 1


class ApiError(Exception):
    """A refusal that this server itself utters.

    Args:
        status: HTTP status.
        message: Names the field, the value and the mend.
        param: The offending field, as the client called it.
        code: For programs.
        headers: Of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers


def invalid(message: str, param: str, code: str = "invalid_value") -> ApiError:
    """A field of the request is wrong."""
    return ApiError(400, message, param=param, code=code)


def error_object(error: Exception) -> dict[str, Any]:
    """``error`` as OpenAI's error object, without the envelope."""
    status = status_of(error)
    kind = _TYPES.get(status) or ("invalid_request_error" if status < 500 else "server_error")
    param = getattr(error, "param", None) or getattr(error, "field", None)
    code = getattr(error, "code", None) or _CODES.get(type(error).__name__)
    if isinstance(error, EngineError):
        code = "engine_unavailable"
    return {"message": _message(error), "type": kind, "param": param, "code": code}


_PRINTED = re.compile(r"(\bworker \d+ died(?: with exit code [^\s:]+)?):.*", re.DOTALL)
"""What a worker died of, and what it printed last."""


def status_of(error: Exception) -> int:
    """The HTTP status that fits ``error``."""
    if isinstance(error, (ApiError, SteploomError)):
        return error.status
    return error.status_code if isinstance(error, HTTPException) else 500


def outward(error: EngineError) -> str:
    """What everybody may know of a fault: not what the worker printed last, which is for the log."""
    return _PRINTED.sub(r"\1", str(error)).partition("\n")[0]


def _message(error: Exception) -> str:
    if isinstance(error, GenerationFailed):
        return f"the pipeline failed: {error}"
    if isinstance(error, EngineError):
        return outward(error)
    if isinstance(error, (ApiError, SteploomError)):
        return str(error)
    return error.detail if isinstance(error, HTTPException) else "internal error; the server's log has more"


def response_of(error: Exception) -> Response:
    """The response that says ``error``."""
    status = status_of(error)
    headers = dict(getattr(error, "headers", None) or {})
    if status in (429, 503):
        after = getattr(error, "retry_after_s", None) if isinstance(error, QueueFull) else None
        headers.setdefault("Retry-After", str(max(RETRY_AFTER_S, math.ceil(after or RETRY_AFTER_S))))
    if isinstance(error, (DeadlineExceeded, GenerationFailed)):
        headers.setdefault("X-Should-Retry", "false")  # the SDK would ask twice more, for the same to happen again
    if status == 401:
        headers.setdefault("WWW-Authenticate", "Bearer")
    return JSONResponse({"error": error_object(error)}, status, headers)


async def handle(request: Request, error: Exception) -> Response:
    """Starlette's exception handler for everything."""
    if status_of(error) >= 500 and not isinstance(error, (SteploomError, ApiError, HTTPException)):
        extra = {"request_id": request.scope.get("steploom.request_id")}
        log.error("%s %s failed", request.method, request.url.path, exc_info=error, extra=extra)
    elif isinstance(error, GenerationFailed):
        log.warning("a request failed: %s\n%s", error, error.remote_traceback)
    response = response_of(error)
    if response.status_code == 405:
        response.headers["Allow"] = ", ".join(sorted(_allowed(request)))
    return response


def _allowed(request: Request) -> set[str]:
    """The methods of all routes of this path: Starlette names those of the first one."""
    routes = [route for route in request.app.routes if isinstance(route, Route)]
    found = [route.methods or set[str]() for route in routes if route.matches(request.scope)[0] is not Match.NONE]
    return set[str]().union(*found)


HANDLERS: dict[Any, Any] = dict.fromkeys((ApiError, SteploomError, HTTPException, Exception), handle)
"""For ``Starlette(exception_handlers=...)``."""

__all__ = ["HANDLERS", "ApiError", "InvalidRequest", "error_object", "handle", "invalid", "response_of", "status_of"]
