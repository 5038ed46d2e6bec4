"""create_app: the server as an ASGI application, to be run or to be mounted into another."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route

from steploom import AsyncDiffusionEngine, ConfigError
from steploom.server import admin, images, status
from steploom.server.access import Gate
from steploom.server.errors import HANDLERS
from steploom.server.openapi import openapi
from steploom.server.page import routes as page
from steploom.server.settings import ServerSettings
from steploom.server.state import ServerState
from steploom.server.telemetry.endpoint import metrics
from steploom.server.telemetry.http import Observed
from steploom.server.text import routes as text
from steploom.server.videos import routes as videos

ROUTES = [
    Route("/v1/images/generations", images.generations, methods=["POST"]),
    Route("/v1/images/edits", images.edits, methods=["POST"]),
    Route("/v1/images/stored/{name}", images.stored, name="stored image"),
    Route("/v1/completions", text.completions, methods=["POST"]),
    Route("/v1/chat/completions", text.chat_completions, methods=["POST"]),
    *videos.ROUTES,
    Route("/v1/models", status.models),
    Route("/v1/models/{name:path}", status.model),
    Route("/v1/requests", status.requests),
    Route("/v1/requests/{request_id}", status.request),
    Route("/v1/requests/{request_id}", status.cancel, methods=["DELETE"]),
    Route("/live", status.live),
    Route("/ready", status.ready),
    Route("/health", status.health),
    Route("/metrics", metrics),
    Route("/openapi.json", openapi),
]


def create_app(engine: AsyncDiffusionEngine, settings: ServerSettings | None = None, **overrides: Any) -> Starlette:
    """The server over ``engine``.

    Run as an application of its own, it starts the engine if that does not run, and closes what it has started.
    Mounted into another (``Mount("/images", create_app(engine))``), it leaves that to the other application; where the
    model makes videos, that one has to hold ``async with app.state.server`` meanwhile, which starts the engine, too.

    Args:
        engine: Who makes everything.
        settings: What is allowed; None takes the defaults.
        overrides: Fields of :class:`~steploom.server.ServerSettings`.

    Raises:
        ConfigError: A setting is wrong.
    """
    try:
        settings = settings or ServerSettings(**overrides)
    except TypeError as error:
        raise ConfigError(f"{error}; ServerSettings lists the fields") from None
    state = ServerState(engine, settings)
    middleware = [Middleware(Gate, settings)]
    if settings.cors_origins:
        middleware.insert(
            0,
            Middleware(CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["*"], allow_headers=["*"]),
        )
    middleware.insert(0, Middleware(Observed, state.telemetry))
    routes = [*ROUTES, *(admin.ROUTES if settings.admin_keys else ()), *(page.ROUTES if settings.page else ())]
    app = Starlette(routes=routes, exception_handlers=HANDLERS, middleware=middleware, lifespan=_lifespan)
    app.state.server = state
    return app


@contextlib.asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncGenerator[None]:
    async with app.state.server:
        yield
