"""What a load has shown: figures with the names that vLLM's ``bench serve`` gives them, and those that are diffusion's.

``e2el`` is the end-to-end latency, ``ttfp`` the time to the first preview, where vLLM has the time to the first token.
Percentiles interpolate linearly, as numpy's do.
"""

from __future__ import annotations

import collections
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

from steploom.cli.benches.load import Outcome
from steploom.cli.benches.standalone import Standalone

MAX_ERRORS = 5
"""Kinds of errors that are told."""


def percentile(values: Iterable[float], share: float) -> float:
    """The value below which ``share`` (0 to 100) of the values lie, interpolated linearly; nan of none."""
    ordered = sorted(values)
    if not ordered:
        return math.nan
    place = (len(ordered) - 1) * share / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def spread(name: str, values: Sequence[float], *, scale: float = 1.0) -> dict[str, float | None]:
    """``mean_NAME``, ``median_NAME``, ``std_NAME``, ``p95_NAME``, ``p99_NAME`` and ``max_NAME``; None each of none.

    Args:
        name: What the values are, with their unit.
        values: The values.
        scale: What they are multiplied by.
    """
    found: dict[str, Callable[[], float]] = {
        "mean": lambda: statistics.mean(values),
        "median": lambda: percentile(values, 50),
        "std": lambda: statistics.pstdev(values),
        "p95": lambda: percentile(values, 95),
        "p99": lambda: percentile(values, 99),
        "max": lambda: max(values),
    }
    return {f"{kind}_{name}": scale * value() if values else None for kind, value in found.items()}


def figures(
    outcomes: Sequence[Outcome],
    duration_s: float,
    *,
    alone: Standalone | None = None,
    slo_multiple: float = 5.0,
    detailed: bool = True,
) -> dict[str, Any]:
    """The figures of a load, ready for JSON.

    Args:
        outcomes: Of the requests that have ended.
        duration_s: Seconds from the first request to the end of the last.
        alone: What each takes alone; without it there are no slowdowns, attainment and goodput.
        slo_multiple: A request attains its objective if it takes at most so many times what it takes alone.
        detailed: Also by class, and by user where users are named.

    A request that failed has not attained its objective; its latency is in no average.
    """
    done = [one for one in outcomes if one.answer is not None]
    answers = [one.answer for one in done if one.answer is not None]
    previews = [one.first_preview_s - one.due_s for one in done if one.first_preview_s is not None]
    found: dict[str, Any] = {
        "completed": len(done),
        "failed": len(outcomes) - len(done),
        "duration": duration_s,
        "request_throughput": _rate(len(done), duration_s),
        "image_throughput": _rate(sum(one.images for one in answers), duration_s),
        "step_throughput": _rate(sum(one.steps for one in answers), duration_s),
        **spread("e2el_ms", [one.latency_s for one in done], scale=1000),
        **spread("ttfp_ms", previews, scale=1000),
        **spread("lateness_ms", [one.lateness_s for one in outcomes], scale=1000),
        "mean_batch_requests": _mean_batch(done),
    }
    if alone is not None:
        found |= _objectives(outcomes, done, duration_s, alone, slo_multiple)
    if detailed:
        found["errors"] = _errors(outcomes)
        found["by_class"] = _by(outcomes, _class_of, duration_s, alone, slo_multiple)
        users = any(one.arrival.user is not None for one in outcomes)
        found["by_user"] = _by(outcomes, _user_of, duration_s, alone, slo_multiple) if users else {}
    return found


def _objectives(
    outcomes: Sequence[Outcome], done: Sequence[Outcome], duration_s: float, alone: Standalone, multiple: float
) -> dict[str, Any]:
    slowdowns = [one.latency_s / alone.seconds(one.arrival) for one in done]
    met = sum(slowdown <= multiple for slowdown in slowdowns)
    return {
        "slo_multiple": multiple,
        "slo_attainment": met / len(outcomes) if outcomes else None,
        "request_goodput": _rate(met, duration_s),
        **spread("slowdown", slowdowns),
    }


def _mean_batch(done: Sequence[Outcome]) -> float | None:
    """Over all steps, as the engine's ``timings.mean_batch_requests`` is over those of one request."""
    told = [one.answer for one in done if one.answer is not None and one.answer.mean_batch_requests is not None]
    steps = sum(max(one.steps, 1) for one in told)
    return sum((one.mean_batch_requests or 0.0) * max(one.steps, 1) for one in told) / steps if told else None


def _by(
    outcomes: Sequence[Outcome],
    name: Callable[[Outcome], str],
    duration_s: float,
    alone: Standalone | None,
    multiple: float,
) -> dict[str, Any]:
    groups: dict[str, list[Outcome]] = collections.defaultdict(list)
    for one in sorted(outcomes, key=lambda one: (one.arrival.width * one.arrival.height, one.index)):
        groups[name(one)].append(one)
    return {
        group: figures(members, duration_s, alone=alone, slo_multiple=multiple, detailed=False)
        for group, members in groups.items()
    }


def _class_of(one: Outcome) -> str:
    return f"{one.arrival.width}x{one.arrival.height}"


def _user_of(one: Outcome) -> str:
    return one.arrival.user if one.arrival.user is not None else "(no user)"


def _errors(outcomes: Sequence[Outcome]) -> dict[str, int]:
    return dict(collections.Counter(one.error for one in outcomes if one.error is not None).most_common(MAX_ERRORS))


def _rate(count: float, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0


def plain(value: Any) -> Any:
    """``value`` without what JSON cannot say: a number that is infinite or none becomes null."""
    if isinstance(value, dict):
        entries = cast("dict[str, Any]", value)
        return {key: plain(entry) for key, entry in entries.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
