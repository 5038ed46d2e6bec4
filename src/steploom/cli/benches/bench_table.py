"""The figures of a load as a table, in the words of vLLM's ``bench serve``."""

from __future__ import annotations

from typing import Any

WIDTH = 58
MOST_USERS = 10
"""Users that the table names: those with the most requests."""

_LINES = (
    ("Successful requests", "completed"),
    ("Failed requests", "failed"),
    ("Maximum request concurrency", "max_concurrency"),
    ("Peak concurrent requests", "max_concurrent_requests"),
    ("Request rate configured (req/s)", "request_rate"),
    ("Serial capacity (req/s)", "serial_capacity"),
    ("Load (share of it)", "load"),
    ("Benchmark duration (s)", "duration"),
    ("Request throughput (req/s)", "request_throughput"),
    ("Request goodput (req/s)", "request_goodput"),
    ("Image throughput (img/s)", "image_throughput"),
    ("Step throughput (step/s)", "step_throughput"),
    ("Mean requests in a batch", "mean_batch_requests"),
    ("Mean rows of a merged call", "mean_rows"),
    ("One at a time (img/s)", "baseline_image_throughput"),
    ("Gain over one at a time", "gain"),
)
_SPREADS = (
    ("End-to-end Latency", "E2EL (ms)", "e2el_ms"),
    ("Time to First Preview", "TTFP (ms)", "ttfp_ms"),
    ("Slowdown (latency / alone)", "slowdown", "slowdown"),
    ("Join Delay (steps of others)", "join delay", "join_delay_steps"),
    ("Lateness of the client", "lateness (ms)", "lateness_ms"),
)
_KINDS = (("Mean", "mean"), ("Median", "median"), ("P95", "p95"), ("P99", "p99"))


def lines(found: dict[str, Any], title: str) -> list[str]:
    """The table, line by line."""
    if found.get("interrupted"):
        title += " (interrupted)"
    told = [f" {title} ".center(WIDTH, "=")]
    told += [_line(label, found[key]) for label, key in _LINES if found.get(key) is not None]
    if found.get("slo_attainment") is not None:
        label = f"Attainment of {found['slo_multiple']:g} x standalone"
        told.append(_line(label, f"{found['slo_attainment']:.1%}"))
    for heading, name, key in _SPREADS:
        if found.get(f"max_{key}") is not None and (key != "lateness_ms" or found["max_lateness_ms"] > 0):
            told.append(heading.center(WIDTH, "-"))
            told += [_line(f"{kind} {name}", found[f"{short}_{key}"]) for kind, short in _KINDS]
    free = found.get("p99_join_delay_steps_slot_free")
    if free is not None:
        told.append(_line("P99 join delay, a slot free", free))
    told += _groups("By size", found.get("by_class") or {})
    told += _groups("By user", found.get("by_user") or {})
    if found.get("errors"):
        told.append("Errors".center(WIDTH, "-"))
        told += [f"{count} x {error}" for error, count in found["errors"].items()]
    return [*told, "=" * WIDTH]


def _groups(heading: str, groups: dict[str, dict[str, Any]]) -> list[str]:
    if len(groups) < 2:
        return []
    told = [heading.center(WIDTH, "-"), f"{'':14}{'done':>7}{'mean ms':>11}{'p99 ms':>11}{'slowdown':>9}{'met':>6}"]
    shown = groups
    if len(groups) > MOST_USERS:
        by_size = sorted(groups, key=lambda name: -groups[name]["completed"] - groups[name]["failed"])
        shown = {name: groups[name] for name in by_size[:MOST_USERS]}
    for name, one in shown.items():
        cells = (_short(one["mean_e2el_ms"]), _short(one["p99_e2el_ms"]), _short(one.get("mean_slowdown")))
        met = one.get("slo_attainment")
        share = "-" if met is None else f"{met:.0%}"
        told.append(f"{name[:14]:14}{one['completed']:>7}{cells[0]:>11}{cells[1]:>11}{cells[2]:>9}{share:>6}")
    if len(shown) < len(groups):
        told.append(f"and {len(groups) - len(shown)} more")
    return told


def _line(label: str, value: Any) -> str:
    return f"{label + ':':40}{_short(value):<{WIDTH - 40}}".rstrip()


def _short(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def show(found: dict[str, Any], title: str) -> None:
    """Prints the table."""
    from rich.console import Console

    console = Console(highlight=False)
    for line in lines(found, title):
        console.print(line, markup=False, soft_wrap=True)
