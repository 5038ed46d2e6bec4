"""Figures as tables: on the terminal, and in Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from simulation.study import Row

USERS = 5
"""So many users are named: those who ask for most."""


def print_rows(rows: Sequence[Row]) -> None:
    """The policies of one scenario at one load."""
    scenario, figures = rows[0].scenario, rows[0].figures
    load = "" if scenario.bursts else f", load {rows[0].load:g} ({rows[0].rate:.4g} requests/s)"
    title = f"{scenario.workload} on {scenario.costs.name}{load}, {figures.requests} requests"
    table = Table(title=title, title_justify="left")
    table.add_column("policy")
    heads = ["mean s", "p50", "p95", "p99", "slowdown", "p99", "in time", *figures.classes]
    for head in [*heads, "requests/tick", "rows/tick", "requests/s", "refused", "failed"]:
        table.add_column(head, justify="right")
    for row in rows:
        table.add_row(row.policy, *cells(row))
    console = Console(width=None if Console().is_terminal else 220)
    console.print(table)
    for row in rows:
        if row.figures.users:
            console.print(f"{row.policy}: {users(row)}", highlight=False)


def cells(row: Row) -> list[str]:
    """A row's figures."""
    one = row.figures
    seconds = [number(value) for value in (one.mean_s, one.p50_s, one.p95_s, one.p99_s)]
    slowdowns = [number(one.slowdown), number(one.slowdown_p99)]
    shares = [share(value) for value in (one.attained, *one.classes.values())]
    return [
        *seconds,
        *slowdowns,
        *shares,
        number(one.mates),
        number(one.rows),
        number(one.per_s),
        *map(str, (one.refused, one.failed)),
    ]


def users(row: Row) -> str:
    """Attainment of the users who ask for most, and of the rest."""
    asked: dict[str, int] = {}
    for outcome in row.runs[0].outcomes:
        asked[outcome.arrival.user or ""] = asked.get(outcome.arrival.user or "", 0) + 1
    most = sorted(asked, key=lambda user: (-asked[user], user))[:USERS]
    rest = [value for user, value in row.figures.users.items() if user not in most]
    named = [f"{user} ({asked[user]} requests) {share(row.figures.users[user])}" for user in most]
    if rest:
        named.append(f"mean of {len(rest)} others {share(sum(rest) / len(rest))}")
    return "in time by user: " + ", ".join(named)


def print_goodput(found: Sequence[Mapping[str, Any]], target: float) -> None:
    """The highest loads of one scenario."""
    table = Table(title=f"{found[0]['workload']}: goodput at {target:.0%} in time", title_justify="left")
    for head in ("policy", "load", "requests/s"):
        table.add_column(head, justify="left" if head == "policy" else "right")
    for one in found:
        table.add_row(one["policy"], number(one["load"]), number(one["rate_per_s"]))
    Console().print(table)


def number(value: float) -> str:
    """Three digits that count."""
    if math.isnan(value):
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def share(value: float) -> str:
    """A percentage."""
    return "-" if math.isnan(value) else f"{value:.0%}" if value in (0, 1) else f"{100 * value:.1f}%"
