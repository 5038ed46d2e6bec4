"""The page itself, what it needs to know of the model, and the connection that feeds it."""

from __future__ import annotations

import hashlib
from importlib import resources
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import steploom
from steploom.protocol import PipelineInfo
from steploom.server.errors import ApiError
from steploom.server.kinds import FormText, whole
from steploom.server.openapi.components import TEXT
from steploom.server.openapi.operation import as_json, operation
from steploom.server.openapi.page import INFO, TICKS
from steploom.server.state import ServerState

_CSP = "; ".join(
    (
        "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self' blob: data:",
        "connect-src 'self'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
    )
)  # fmt: skip
_HEADERS = {
    "Content-Security-Policy": _CSP,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
"""Nothing but our own files, and asked again each time whether they are still the same."""

_PLACE = whole(0, 2**53)
_INDEX = "index.html"
_KINDS = {".js": "text/javascript", ".css": "text/css", ".html": "text/html", ".svg": "image/svg+xml"}
_DEMO = {
    "suggested": {"num_inference_steps": 24, "guidance_scale": 5.0},
    "examples": [
        "a large red circle above a small blue square on a white background",
        "a small yellow star on a black background",
        "a large pink heart to the left of a small cyan ring on a gray background",
        "a medium green triangle below a large purple diamond on a white background",
    ],
}
"""Of the built-in model, which understands few words."""


def _files() -> dict[str, tuple[bytes, str, str]]:
    """The page's files by name: bytes, type, tag. They are few and small, and lie in the package."""
    found: dict[str, tuple[bytes, str, str]] = {}
    for file in (resources.files(steploom) / "server" / "page" / "static").iterdir():
        kind = next((kind for ending, kind in _KINDS.items() if file.name.endswith(ending)), None)
        if kind is not None:
            data = file.read_bytes()
            tag = f'"{hashlib.sha256(data).hexdigest()[:24]}"'
            found[file.name] = (data, kind, tag)
    return found


_FILES = _files()


@operation(answers={200: {"text/html": {}}, 304: {}})
async def index(request: Request) -> Response:
    """The page."""
    return _answer(request, _INDEX)


@operation(answers={200: {kind: {} for kind in _KINDS.values()}, 304: {}}, errors=(404,))
async def asset(request: Request) -> Response:
    """A file of the page."""
    name = request.path_params["name"]
    if name not in _FILES or name == _INDEX:
        raise ApiError(404, f"no such file {name!r:.80}", code="not_found")
    return _answer(request, name)


def _answer(request: Request, name: str) -> Response:
    data, kind, tag = _FILES[name]
    headers = {**_HEADERS, "ETag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(data, media_type=kind, headers=headers)


@operation(answers={200: as_json(INFO)}, errors=(503,))
async def info(request: Request) -> Response:
    """What can be asked for: the fields that the model takes, its defaults and bounds."""
    state: ServerState = request.app.state.server
    state.check_serving()
    config, pipeline = state.engine.config, state.engine.info
    demo: dict[str, Any] = _DEMO if config.model == "demo" else {"suggested": {}, "examples": []}
    return JSONResponse(
        {
            "object": "info", "version": steploom.__version__, "models": [*state.model_names, *state.lora_names],
            "pipeline_class": pipeline.pipeline_class, "makes": pipeline.makes,
            "parameters": _names(pipeline), "image_parameters": _image_parameters(pipeline),
            "default_steps": pipeline.default_steps, "default_size": pipeline.default_size,
            "size_multiple": pipeline.size_multiple, "size_most": pipeline.size_most,
            "max_pixels": config.max_pixels, "max_steps": config.max_steps, "max_batch": config.batch_limit,
            "max_images": state.settings.max_images, "needs_image": _needs_image(pipeline), **demo,
        },
        headers={"Cache-Control": "no-store"},
    )  # fmt: skip


def _names(info: PipelineInfo) -> list[str]:
    return [parameter.name for parameter in info.parameters]


def _needs_image(info: PipelineInfo) -> bool:
    return any(parameter.name == "image" and parameter.required for parameter in info.parameters)


def _image_parameters(info: PipelineInfo) -> list[str] | None:
    """What a request with an image may give: of the model's own pipeline, or of its family's; None if there is none."""
    members = [info, *info.tasks.get("image-to-image", [])]
    return next((_names(one) for one in members if "image" in _names(one)), None)


@operation(
    answers={200: TICKS}, errors=(409, 429, 503), query={"after": whole(0, 2**53).schema, "feed": TEXT, "channel": TEXT}
)
async def ticks(request: Request) -> Response:
    """Server-sent events: what each tick does, and the images that were handed over to this connection."""
    state: ServerState = request.app.state.server
    query = request.query_params
    after = _PLACE("after", FormText(query.get("after", "0")))
    known = query.get("feed", state.channels.feed.name) == state.channels.feed.name
    return state.channels.open(query.get("channel"), after if known else 0)


ROUTES = [
    Route("/", index),
    Route("/page/{name}", asset),
    Route("/v1/info", info),
    Route("/v1/ticks", ticks),
]
