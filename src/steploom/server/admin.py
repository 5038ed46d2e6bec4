"""What an operator may have the engine do: pause, drain, sleep, another model. There where a server has admin keys."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from steploom.errors import ConfigError, EngineError
from steploom.server.body import read_json
from steploom.server.errors import ApiError, invalid, outward
from steploom.server.openapi.components import INTEGER, TEXT, component, constant, exactly
from steploom.server.openapi.operation import Content, as_json, operation
from steploom.server.state import ServerState

_FLAG = {"type": "boolean"}
_STATE = exactly(
    {
        "object": constant("engine"), "model": TEXT, "paused": _FLAG, "draining": _FLAG, "asleep": _FLAG,
        "running": INTEGER, "waiting": INTEGER, "ended": INTEGER,
    },
    "ended",
)  # fmt: skip
ENGINE = component("Engine", _STATE)
LOADED = ("model", "base_model", "revision", "variant", "dtype")
"""Settings that may change with the model."""


def _state(request: Request) -> ServerState:
    return request.app.state.server


def _shown(state: ServerState, **more: int) -> Response:
    engine = state.engine
    return JSONResponse({
        "object": "engine", "model": state.model_names[0], "paused": engine.paused, "draining": engine.draining,
        "asleep": engine.asleep, "running": engine.num_running, "waiting": engine.num_waiting, **more,
    })  # fmt: skip


async def _told(state: ServerState, call: Callable[[], Awaitable[int | None]]) -> Response:
    """What the engine is like once it has done that.

    Raises:
        ApiError: 400: a setting is wrong; 409: not now, or it has failed, and everything is as it was.
    """
    if state.loading is not None:
        raise ApiError(503, f"the model is being loaded: {state.loading}", code="loading")
    try:
        ended = await call()
    except ConfigError as error:
        raise ApiError(400, str(error), code="invalid_value") from None
    except EngineError as error:
        if not state.engine.serves:
            raise
        raise ApiError(409, outward(error), code="not_now") from None
    return _shown(state) if ended is None else _shown(state, ended=ended)


async def _fields(request: Request, *known: str) -> dict[str, Any]:
    """The fields of a body, which may be left out.

    Raises:
        ApiError: 400: it is no JSON object, or has other fields.
    """
    fields = await read_json(request) if await request.body() else dict[str, Any]()
    for name in fields:
        if name not in known:
            raise invalid(f"{name:.80}: there are {', '.join(known)}", name[:80], "unknown_parameter")
    return fields


def _body(**fields: Any) -> dict[str, Any]:
    """The body of an operation, as :func:`operation` takes it."""
    schema = {"type": "object", "properties": fields, "additionalProperties": False}

    def body(state: ServerState) -> Content:
        return as_json(schema)

    return {"body": body, "body_required": False}


_ANSWERS: dict[str, Any] = {"answers": {200: as_json(ENGINE)}, "errors": (409, 413, 415, 503)}


@operation(answers={200: as_json(ENGINE)})
async def engine(request: Request) -> Response:
    """What the engine has been told, and how much it has to do."""
    return _shown(_state(request))


@operation(**_ANSWERS)
async def pause(request: Request) -> Response:
    """Stops between two steps: nobody is refused, nobody goes on."""
    state = _state(request)
    return await _told(state, state.engine.pause)


@operation(**_ANSWERS)
async def resume(request: Request) -> Response:
    """Goes on after a pause, and takes requests again after a drain."""
    state = _state(request)
    return await _told(state, state.engine.resume)


@operation(**_ANSWERS, **_body(timeout_s={"type": ["number", "null"], "minimum": 0}))
async def drain(request: Request) -> Response:
    """Refuses new requests, and answers when the others have ended, or were."""
    state, fields = _state(request), await _fields(request, "timeout_s")
    return await _told(state, partial(state.engine.drain, fields.get("timeout_s")))


@operation(**_ANSWERS, **_body(level={"enum": [1, 2]}))
async def sleep(request: Request) -> Response:
    """Moves the weights off the device, once what was accepted is done."""
    state, fields = _state(request), await _fields(request, "level")
    return await _told(state, partial(state.engine.sleep, fields.get("level", 1)))


@operation(**_ANSWERS)
async def wake_up(request: Request) -> Response:
    """Moves the weights back."""
    state = _state(request)
    return await _told(state, state.engine.wake_up)


@operation(**_ANSWERS, **_body(**{name: {"type": "string", "minLength": 1} for name in LOADED}))
async def reload(request: Request) -> Response:
    """Loads other weights, or another model, while requests are served."""
    state, fields = _state(request), await _fields(request, *LOADED)
    return await _told(state, partial(state.engine.reload, **fields))


ROUTES = [
    Route("/admin/engine", engine),
    *(
        Route(f"/admin/{what.__name__}", what, methods=["POST"])
        for what in (pause, resume, drain, sleep, wake_up, reload)
    ),
]
