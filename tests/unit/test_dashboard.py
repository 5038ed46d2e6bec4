"""The Grafana dashboard: every metric and label that it asks for is one that the server has."""

from __future__ import annotations

import json
import pathlib
import re

import pytest
from exposition import Samples, local, scraped

from steploom.server import create_app
from steploom.testing import FakeEngine

ROOT = pathlib.Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "docs" / "deploy" / "grafana-dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
METRIC = re.compile(r"\b((?:steploom|process)_\w+)")
GROUPED = re.compile(r"by \(([^)]*)\)")


def expressions() -> list[str]:
    asked = [target["expr"] for panel in PANELS for target in panel["targets"]]
    return [*asked, *(v["query"]["query"] for v in DASHBOARD["templating"]["list"] if isinstance(v["query"], dict))]


async def served() -> Samples:
    async with FakeEngine() as engine:
        app = create_app(engine)
        async with local(app) as client:
            await client.get("/live")
        return await scraped(app)


async def test_every_metric_of_the_dashboard_is_served() -> None:
    samples = await served()
    labels: dict[str, set[str]] = {}
    for name, held in samples:
        labels.setdefault(name, set()).update(label for label, _ in held)
    asked = {name for expression in expressions() for name in METRIC.findall(expression)}
    assert len(asked) > 25
    assert asked <= labels.keys()
    for expression in expressions():
        grouped = {label.strip() for text in GROUPED.findall(expression) for label in text.split(",")}
        (name, *_) = METRIC.findall(expression)
        assert grouped <= labels[name], expression


async def test_every_metric_of_the_engine_is_on_the_dashboard_or_documented() -> None:
    said = (ROOT / "docs" / "observability.md").read_text()
    for name in (await served()).names:
        plain = re.sub(r"_(bucket|count|sum)$", "", name)
        assert f"`{plain}`" in said or f"`{plain}{{" in said or plain.startswith("process_"), plain


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_is_whole(panel: dict) -> None:
    assert panel["description"].endswith(".")
    assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}
    for target in panel["targets"]:
        expression = target["expr"]
        assert expression.count("(") == expression.count(")")
        assert expression.count('{instance=~"$instance"') == len(METRIC.findall(expression))
        assert ("rate(" in expression or "increase(" in expression) == bool(
            re.search(r"_(total|bucket|sum|count)\b", expression)
        )


def test_panels_do_not_overlap() -> None:
    places = [
        (p["gridPos"]["x"] + dx, p["gridPos"]["y"] + dy)
        for p in DASHBOARD["panels"] for dx in range(p["gridPos"]["w"]) for dy in range(p["gridPos"]["h"])
    ]  # fmt: skip
    assert len(set(places)) == len(places)
    assert max(x for x, _ in places) < 24
    titles = {panel["title"] for panel in PANELS}
    assert titles >= {"Requests", "Queue", "Request", "Batch", "Step", "Unmerged calls", "Memory"}
