"""Spans of ``steploom serve`` go to a collector, if the environment names one as OpenTelemetry has it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping

from steploom.config import LONGEST_S

log = logging.getLogger("steploom.serve")

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


def set_up(env: Mapping[str, str], last_s: float) -> Callable[[], object] | None:
    """Exports spans over OTLP (HTTP) from now on, if ``env`` says where to.

    Where to, headers, sampling and all else are what the OpenTelemetry SDK reads from the environment by itself.

    Args:
        env: The environment.
        last_s: Seconds in which the collector must have taken the last spans; nobody waits longer for that.

    Returns:
        What sends the last spans and ends it; None where nothing is exported.
    """
    name = next((name for name in ENDPOINTS if env.get(name)), None)
    if name is None or env.get("OTEL_SDK_DISABLED", "").lower() == "true" or env.get("OTEL_TRACES_EXPORTER") == "none":
        return None
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        log.warning("%s is set, but there are no traces: %s; pip install 'steploom[otel]'", name, error)
        return None
    from steploom import __version__

    protocol = env.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or env.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    if protocol not in (None, "", "http/protobuf"):
        log.warning("OTEL_EXPORTER_OTLP_PROTOCOL=%s: spans are sent as http/protobuf", protocol)
    is_named = env.get("OTEL_SERVICE_NAME") or "service.name=" in env.get("OTEL_RESOURCE_ATTRIBUTES", "")
    named = {} if is_named else {"service.name": "steploom"}
    resource = Resource.create({**named, "service.version": __version__})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)

    def end() -> None:
        last = threading.Thread(target=provider.shutdown, name="steploom-last-spans", daemon=True)
        last.start()
        last.join(min(last_s, LONGEST_S))

    return end
