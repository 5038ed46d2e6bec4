"""What ``/metrics`` says, read as Prometheus does."""

from __future__ import annotations

from typing import Any

import httpx2
from prometheus_client.parser import text_string_to_metric_families

from steploom.telemetry.metrics import EngineMetrics


class Samples(dict[tuple[str, frozenset[tuple[str, str]]], float]):
    """Values by name and labels."""

    def __call__(self, name: str, **labels: str) -> float:
        return self[f"steploom_{name}", frozenset(labels.items())]

    @property
    def names(self) -> set[str]:
        return {name for name, _ in self}


def parsed(text: str) -> Samples:
    families = text_string_to_metric_families(text)
    return Samples({(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples})


def counted(metrics: EngineMetrics) -> Samples:
    """What an observer says, without HTTP."""
    samples = [sample for family in metrics.collect() for sample in family.samples]
    return Samples({(s.name, frozenset(s.labels.items())): s.value for s in samples})


async def scraped(app: Any) -> Samples:
    async with local(app) as client:
        answer = await client.get("/metrics")
    assert answer.status_code == 200
    return parsed(answer.text)


def local(app: Any, **settings: Any) -> httpx2.AsyncClient:
    """A client of an ASGI application, without a socket."""
    transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
    return httpx2.AsyncClient(transport=transport, base_url="http://steploom.test", **settings)
