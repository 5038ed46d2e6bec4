"""What a server says of itself: models, health, and the requests that run."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from steploom.errors import EngineError
from steploom.server.errors import ApiError
from steploom.server.openapi.components import ERROR
from steploom.server.openapi.operation import as_json, operation
from steploom.server.openapi.status import (
    CANCELLED,
    HEALTHY,
    LIVE,
    MODEL,
    MODELS,
    NOT_READY,
    READY,
    RECOVERING,
    REQUEST,
    REQUESTS,
)
from steploom.server.state import ServerState


def _state(request: Request) -> ServerState:
    return request.app.state.server


@operation(answers={200: as_json(LIVE)})
async def live(request: Request) -> Response:
    """The process runs and its event loop turns."""
    return JSONResponse({"status": "live"})


@operation(answers={200: as_json(READY), 503: as_json(NOT_READY)})
async def ready(request: Request) -> Response:
    """Requests are taken: the model is loaded and warm, a worker lives, and nothing is being shut down."""
    why = _state(request).not_ready()
    return JSONResponse({"status": "ready"}) if why is None else _not_ready(why)


@operation(answers={200: as_json({"anyOf": [HEALTHY, RECOVERING]}), 503: as_json({"anyOf": [NOT_READY, ERROR]})})
async def health(request: Request) -> Response:
    """The workers answer, between two ticks; or one is being replaced, for which nobody need restart the server."""
    state = _state(request)
    try:
        if state.not_ready() in (None, state.resting()):
            await state.engine.check_health()
            return JSONResponse({"status": "healthy", "requests": len(state.running)})
    except EngineError:
        if state.recovering() is None:
            raise
    why, recovering = state.not_ready(), state.recovering()
    if recovering is not None and why in (None, state.resting(), recovering):
        return JSONResponse({"status": "recovering", "why": recovering, "requests": len(state.running)})
    return _not_ready(why or "")


def _not_ready(why: str) -> Response:
    return JSONResponse({"status": "not ready", "why": why}, 503)


@operation(answers={200: as_json(MODELS)})
async def models(request: Request) -> Response:
    """OpenAI's list of models: the model, and each adapter that was registered at start."""
    state = _state(request)
    names = (*state.model_names, *state.lora_names)
    return JSONResponse({"object": "list", "data": [_model(state, name) for name in names]})


@operation(answers={200: as_json(MODEL)}, errors=(404,))
async def model(request: Request) -> Response:
    """One of them."""
    state, name = _state(request), request.path_params["name"]
    if name not in (*state.model_names, *state.lora_names):
        raise ApiError(404, f"model={name!r:.80}: no such model", param="model", code="model_not_found")
    return JSONResponse(_model(state, name))


def _model(state: ServerState, name: str) -> dict[str, Any]:
    shown: dict[str, Any] = {"id": name, "object": "model", "created": state.created, "owned_by": "steploom"}
    if name in state.lora_names:
        shown["parent"] = state.model_names[0]
    return shown


@operation(answers={200: as_json(REQUESTS)})
async def requests(request: Request) -> Response:
    """What waits and runs, at which step, oldest first."""
    return JSONResponse({"object": "list", "data": _state(request).running.shown()})


@operation(answers={200: as_json(REQUEST)}, errors=(404,))
async def request(request: Request) -> Response:
    """One of them."""
    request_id = request.path_params["request_id"]
    found = _state(request).running.find(request_id)
    if found is None:
        raise _no_such(request_id)
    return JSONResponse(found)


@operation(answers={200: as_json(CANCELLED)}, errors=(404, 503))
async def cancel(request: Request) -> Response:
    """Ends one of them; its client gets an error."""
    state, request_id = _state(request), request.path_params["request_id"]
    if request_id not in state.running or not await state.engine.abort(request_id):
        raise _no_such(request_id)
    return JSONResponse({"id": request_id, "object": "request.cancelled", "cancelled": True})


def _no_such(request_id: str) -> ApiError:
    return ApiError(404, f"no request {request_id!r:.80} waits or runs", code="not_found")
