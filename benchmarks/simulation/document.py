"""The policy table of ``docs/policies.md``: generated, between markers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from simulation import costs
from simulation.picture import picture
from simulation.scenario import Scenario
from simulation.study import Row, Study, known_policies
from simulation.tables import number, share, users

DOCS = Path(__file__).resolve().parents[2] / "docs"
SEEDS, REQUESTS, GOODPUT_REQUESTS, WARM_UP = 3, 600, 1000, 200
LOADS, BURSTY_LOADS, TRACE_LOADS, SMALL = (0.5, 0.7, 0.9, 1.05), (0.5, 0.9), (0.15, 0.3), (32, 48, 64, 96)


def write(page: Path, trace: Path | None, study: Study, requests: int = REQUESTS) -> list[Path]:
    """Writes the block of the page, and its pictures beside it; without ``trace`` what it says of W3 stays.

    Returns:
        The files.
    """
    text = page.read_text()
    files = [page]
    for name, body, rows in sections(trace, study, requests):
        pattern = re.compile(f"(<!-- simulate: {name} begin -->\n).*?(<!-- simulate: {name} end -->\n)", re.S)
        if not pattern.search(text):
            raise ValueError(
                f"{page}: has no lines '<!-- simulate: {name} begin -->' and '<!-- simulate: {name} end -->'"
            )
        drawn = ""
        if rows:
            image = page.parent / "images" / f"sched-{name.lower()}.svg"
            image.write_text(picture(rows, study.slo))
            files.append(image)
            drawn = f"\n![{name}: slowdowns and attainment by policy](images/{image.name})\n"
        text = pattern.sub(lambda found: found[1] + body + drawn + found[2], text)  # noqa: B023
    page.write_text(text)
    return files


def sections(trace: Path | None, study: Study, requests: int) -> list[tuple[str, str, list[Row]]]:
    """Name, Markdown, and the rows that are drawn, of each part of the page."""
    h200, demo = costs.load("h200"), costs.load("demo-cpu")
    parts: list[tuple[str, str, list[Row]]] = []
    warm_up = min(WARM_UP, requests)
    plan = [
        ("W1", Scenario("W1", h200, None, requests, warm_up), LOADS, 0.9),
        ("W2", Scenario("W2", h200, None, requests, warm_up), BURSTY_LOADS, 0.9),
        ("W1-demo", Scenario("W1", demo, SMALL, requests, warm_up), (0.9,), None),
        ("W4", Scenario("W4", h200, warm_up=warm_up), (1.0,), 1.0),
    ]
    if trace is not None:
        plan.insert(2, ("W3", Scenario("W3", h200, None, requests, warm_up, trace), TRACE_LOADS, TRACE_LOADS[0]))
    for name, scenario, loads, drawn in plan:
        rows = study.rows(scenario, known_policies(), loads)
        shown = [row for row in rows if row.load == drawn]
        by_user = "".join(f"- `{row.policy}`, load {row.load:g}, {users(row)}\n" for row in shown if row.figures.users)
        parts.append((name, table(rows) + (f"\n{by_user}" if by_user else ""), shown))
    parts.append(("goodput", _goodputs(study, min(2 * requests, GOODPUT_REQUESTS)), []))
    return parts


def table(rows: Sequence[Row]) -> str:
    """A scenario's policies, load by load."""
    scenario, first = rows[0].scenario, rows[0].figures
    classes = list(first.classes) if len(first.classes) > 1 else []
    load = [] if scenario.bursts else ["load"]
    heads = [*load, "policy", "in time", *classes, "mean s", "p50", "p95", "p99", "slowdown", "p99"]
    heads += ["last s"] if scenario.bursts else []
    heads += ["requests a tick", "refused"]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for row in rows:
        one = row.figures
        cells = [] if scenario.bursts else [f"{row.load:g}"]
        cells += [f"`{row.policy}`", share(one.attained), *(share(one.classes[kind]) for kind in classes)]
        cells += map(number, (one.mean_s, one.p50_s, one.p95_s, one.p99_s, one.slowdown, one.slowdown_p99))
        cells += [number(one.last_s)] if scenario.bursts else []
        cells += [number(one.mates), str(one.refused)]
        lines.append("| " + " | ".join(cells) + " |")
    many = "24 requests" if scenario.bursts else f"{first.requests:,} requests, medians of {len(rows[0].runs)} seeds"
    return f"\nCosts `{scenario.costs.name}`, {many}.\n\n" + "\n".join(lines) + "\n"


def _goodputs(study: Study, requests: int) -> str:
    h200, warm_up = costs.load("h200"), min(WARM_UP, requests)
    plan = [
        ("W1", Scenario("W1", h200, None, requests, warm_up)),
        ("W2", Scenario("W2", h200, None, requests, warm_up)),
        ("W2 at 512x512", Scenario("W2", h200, (512,), requests, warm_up)),
    ]
    policies = known_policies()
    found = [study.goodputs(scenario, policies, 0.9) for _, scenario in plan]
    lines = ["| policy | " + " | ".join(name for name, _ in plan) + " |", "|" + " --- |" * (len(plan) + 1)]
    for i, policy in enumerate(policies):
        cells = [f"{number(loads[i][1])} a second (load {number(loads[i][0])})" for loads in found]
        lines.append(f"| `{policy}` | " + " | ".join(cells) + " |")
    return f"\nCosts `h200`, {requests:,} requests, seed 0.\n\n" + "\n".join(lines) + "\n"
