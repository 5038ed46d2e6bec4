"""``/metrics``."""

from __future__ import annotations

from starlette.requests import Request
from starlette.types import ASGIApp

from steploom.server.openapi.operation import operation
from steploom.server.telemetry import Telemetry


@operation(answers={200: {"text/plain": {"type": "string"}, "application/openmetrics-text": {"type": "string"}}})
async def metrics(request: Request) -> ASGIApp:
    """The metrics as of now, in the text format of Prometheus or of OpenMetrics, as ``Accept`` says."""
    telemetry: Telemetry = request.app.state.server.telemetry
    return await telemetry.exposition()
