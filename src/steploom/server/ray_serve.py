"""Ray Serve: servers in replicas on the nodes of a cluster, behind one address."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starlette.applications import Starlette

from steploom import AsyncDiffusionEngine, ConfigError, EngineConfig
from steploom.errors import unusable
from steploom.server.app import create_app
from steploom.server.settings import ServerSettings
from steploom.server.videos.store import folder_for


def application(config: EngineConfig, settings: ServerSettings | None = None, **options: Any) -> Any:
    """An application for ``ray.serve.run``: each replica is a server with an engine, and so a model, of its own.

    A replica whose engine is dead is unhealthy, and Ray Serve replaces it.

    Args:
        config: The engine's settings, of every replica.
        settings: What the servers allow; None takes the defaults, without the page, which would show one replica.
        options: Of Ray Serve's deployment: ``num_replicas``, ``ray_actor_options``, ``autoscaling_config``... Requests
            that it gives a replica at once (``max_ongoing_requests``) are as many as its engine takes, unless given.

    Returns:
        A ``ray.serve.Application``.

    Raises:
        ConfigError: Ray Serve is not installed, or a setting is wrong.
    """
    try:
        serve: Any = importlib.import_module("ray.serve")
    except ImportError as error:
        raise ConfigError(f"ray_serve: {unusable(error)}; pip install 'steploom[ray]'") from None
    allowed = settings or ServerSettings(page=False)

    def build() -> Starlette:
        """The server of a replica, made in it."""
        folder = Path(allowed.video_dir) if allowed.video_dir is not None else folder_for(config.model)
        own = folder / serve.get_replica_context().replica_tag  # one server at a time may use a folder
        return create_app(AsyncDiffusionEngine(config), dataclasses.replace(allowed, video_dir=own))

    class Replica:
        """One server."""

        app: Any

        async def check_health(self) -> None:
            """Asked by Ray Serve every few seconds."""
            self.app.state.server.engine.check_serving()

    ours = {"name": "steploom", "max_ongoing_requests": config.max_waiting + config.resident_limit}
    return serve.deployment(**{**ours, **options})(serve.ingress(build)(Replica)).bind()


def build(arguments: Mapping[str, Any]) -> Any:
    """The application of a configuration file, as ``steploom.server.ray_serve:build``.

    Args:
        arguments: Fields of :class:`~steploom.EngineConfig`; under ``"server"`` those of
            :class:`~steploom.server.ServerSettings`. The number of replicas, and what each of them needs, stand with
            the deployment ``steploom`` in the same file.

    Raises:
        ConfigError: One is unknown or wrong.
    """
    fields = dict(arguments)
    server = fields.pop("server", None)
    try:
        return application(EngineConfig(**fields), ServerSettings(**server) if server is not None else None)
    except TypeError as error:
        raise ConfigError(f"args: {error}; EngineConfig and ServerSettings list the fields") from None
