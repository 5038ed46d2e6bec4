"""``/openapi.json``: one entry for each route of the application, in OpenAPI 3.1."""

from __future__ import annotations

import re
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route, compile_path

import steploom
from steploom.server.access import keys_of
from steploom.server.openapi.components import COMPONENTS, ERROR, TEXT
from steploom.server.openapi.operation import Content, Operation, as_json, operation, operation_of
from steploom.server.state import ServerState

_REFERENCE = re.compile(r"#/components/schemas/(\w+)")
_HEADERS = {"x-request-id": {"description": "The client's own, or a new one.", "schema": TEXT}}
_ALWAYS = (400, 500)
_REASONS = {499: "Cancelled"}
_CONVERTED = {"int": {"type": "integer", "minimum": 0}, "float": {"type": "number", "minimum": 0}}


def document(routes: Iterable[BaseRoute], state: ServerState, root_path: str = "") -> dict[str, Any]:
    """The OpenAPI document of a server.

    Args:
        routes: Of its application.
        state: Whose bounds it states.
        root_path: Where a proxy, or the application that it is mounted into, has put it.
    """
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        if isinstance(route, Route) and route.include_in_schema:
            entries = paths.setdefault(compile_path(route.path)[1], {})
            for method in sorted((route.methods or {"GET"}) - {"HEAD"}):
                entries[method.lower()] = _entry(route, operation_of(route.endpoint), state)
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "steploom", "version": steploom.__version__, "description": _DESCRIPTION},
        "servers": [{"url": root_path or "/"}],
        "paths": paths,
        "components": {"schemas": _reached(paths)},
    }
    if state.settings.api_keys or state.settings.admin_keys:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return found


_DESCRIPTION = "Diffusion models whose requests share forwards, behind OpenAI's API."


def _entry(route: Route, known: Operation, state: ServerState) -> dict[str, Any]:
    described = (route.endpoint.__doc__ or route.name).strip()
    home = str(route.endpoint.__module__).removesuffix(".routes").rpartition(".")[2]
    entry: dict[str, Any] = {
        "operationId": f"{home}.{route.name.replace(' ', '_')}",
        "summary": described.partition("\n")[0],
        "parameters": _parameters(route, known),
        "responses": _responses(route, known, state),
    }
    if known.body is not None:
        entry["requestBody"] = {"required": known.body_required, "content": _content(known.body(state))}
    if keys_of(route.path, state.settings):
        entry["security"] = [{"key": []}]
    return entry


def _parameters(route: Route, known: Operation) -> list[dict[str, Any]]:
    kinds = {name: type(one).__name__.removesuffix("Convertor").lower() for name, one in route.param_convertors.items()}
    named = dict(re.findall(r"{(\w+):(\w+)}", route.path))
    path = [
        {"name": name, "in": "path", "required": True, "schema": _CONVERTED.get(named.get(name, kind), TEXT)}
        for name, kind in kinds.items()
    ]
    headers = [
        {"name": name, "in": "header", "description": what, "schema": TEXT} for name, what in known.headers.items()
    ]
    return [*path, *headers, *({"name": name, "in": "query", "schema": one} for name, one in known.query.items())]


def _responses(route: Route, known: Operation, state: ServerState) -> dict[str, Any]:
    answers: dict[int, Content] = dict.fromkeys((*_ALWAYS, *known.errors), as_json(ERROR))
    if keys_of(route.path, state.settings):
        answers[401] = as_json(ERROR)
    answers |= known.answers
    return {str(status): _response(status, answers[status]) for status in sorted(answers)}


def _response(status: int, content: Content) -> dict[str, Any]:
    headers: dict[str, Any] = dict(_HEADERS)
    if status in (429, 503):
        headers["Retry-After"] = {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}
    said: dict[str, Any] = {"description": _REASONS.get(status) or HTTPStatus(status).phrase, "headers": headers}
    return {**said, "content": _content(content)} if content else said


def _content(content: Content) -> dict[str, Any]:
    return {kind: {"schema": schema} if schema else {} for kind, schema in content.items()}


def _reached(paths: dict[str, Any]) -> dict[str, Any]:
    """The components that the paths refer to, directly or not."""
    found: dict[str, Any] = {}
    wanted = set(_REFERENCE.findall(repr(paths)))
    while wanted:
        name = wanted.pop()
        found[name] = COMPONENTS[name]
        wanted |= set(_REFERENCE.findall(repr(found[name]))) - set(found)
    return dict(sorted(found.items()))


@operation(answers={200: as_json({"type": "object"})})
async def openapi(request: Request) -> Response:
    """This document."""
    return JSONResponse(document(request.app.routes, request.app.state.server, request.scope.get("root_path", "")))
