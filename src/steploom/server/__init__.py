"""An HTTP server over an engine: OpenAI's APIs of images and text, streaming, health, what runs (extra ``server``)."""

from __future__ import annotations

from steploom.server.app import create_app
from steploom.server.settings import ServerSettings

__all__ = ["ServerSettings", "create_app"]
