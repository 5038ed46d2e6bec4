"""What is said of a run: latencies, slowdowns, attainment."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from simulation.engine import Outcome, Run

SLO = 5.0
"""Times its standalone time within which a request should finish, unless it has a deadline."""


@dataclasses.dataclass(frozen=True)
class Figures:
    """One run, or the medians of several. Latencies are those of the requests that finished; NaN if none did.

    Attributes:
        requests: Requests that count.
        mean_s: Mean latency.
        p50_s: Median latency.
        p95_s: 95th percentile.
        p99_s: 99th percentile.
        last_s: The longest latency.
        slowdown: Mean of latency by standalone time.
        slowdown_p99: Its 99th percentile.
        attained: Share of all requests that finished in time (refused and timed-out ones did not).
        classes: The same of each size.
        users: The same of each user, where requests have users.
        mates: Mean requests of a tick.
        rows: Mean rows of a tick.
        per_s: Requests finished a second, from the first arrival to the last end.
        refused: Requests that were refused at once.
        failed: Requests that timed out.
    """

    requests: int
    mean_s: float
    p50_s: float
    p95_s: float
    p99_s: float
    last_s: float
    slowdown: float
    slowdown_p99: float
    attained: float
    classes: dict[str, float]
    users: dict[str, float]
    mates: float
    rows: float
    per_s: float
    refused: int
    failed: int

    def as_json(self) -> dict[str, Any]:
        """Plain data; what is not a number is None."""
        return {name: _plain(value) for name, value in dataclasses.asdict(self).items()}


def figures(run: Run, slo: float = SLO) -> Figures:
    """The figures of one run."""
    outcomes = run.outcomes
    finished = [outcome for outcome in outcomes if outcome.ended == "finished"]
    latencies = sorted(outcome.latency_s for outcome in finished)
    slowdowns = sorted(outcome.slowdown for outcome in finished)
    users = _shares(outcomes, slo, lambda one: one.arrival.user or "")
    return Figures(
        requests=len(outcomes),
        mean_s=mean(latencies),
        p50_s=percentile(latencies, 50),
        p95_s=percentile(latencies, 95),
        p99_s=percentile(latencies, 99),
        last_s=percentile(latencies, 100),
        slowdown=mean(slowdowns),
        slowdown_p99=percentile(slowdowns, 99),
        attained=mean([outcome.attained(slo) for outcome in outcomes]),
        classes=_shares(outcomes, slo, size_of),
        users=users if set(users) != {""} else {},
        mates=run.requests / run.ticks if run.ticks else math.nan,
        rows=run.rows / run.ticks if run.ticks else math.nan,
        per_s=len(finished) / run.span_s if run.span_s else math.nan,
        refused=sum(outcome.ended == "refused" for outcome in outcomes),
        failed=sum(outcome.ended == "failed" for outcome in outcomes),
    )


def medians(rounds: Sequence[Figures]) -> Figures:
    """Each figure's median over seeds."""
    if len(rounds) == 1:
        return rounds[0]
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Figures):
        seen = [getattr(one, field.name) for one in rounds]
        if isinstance(seen[0], dict):
            names = sorted({name for one in seen for name in one}, key=_by_size)
            values[field.name] = {name: statistics.median([one[name] for one in seen if name in one]) for name in names}
        elif isinstance(seen[0], int):
            values[field.name] = round(statistics.median(seen))
        else:
            values[field.name] = statistics.median(seen)
    return Figures(**values)


def size_of(outcome: Outcome) -> str:
    """The class of a request: its size."""
    return f"{outcome.arrival.width}x{outcome.arrival.height}"


def mean(values: Iterable[float]) -> float:
    """NaN if there are none."""
    known = list(values)
    return math.fsum(known) / len(known) if known else math.nan


def percentile(ascending: Sequence[float], percent: float) -> float:
    """The nearest rank: the least value that ``percent`` % of the values do not exceed; NaN if there are none."""
    if not ascending:
        return math.nan
    return ascending[max(0, math.ceil(len(ascending) * percent / 100) - 1)]


def _shares(outcomes: Sequence[Outcome], slo: float, kind_of: Callable[[Outcome], str]) -> dict[str, float]:
    """Attainment by kind, small sizes first, else by name."""
    kinds: dict[str, list[bool]] = {}
    for outcome in outcomes:
        kinds.setdefault(kind_of(outcome), []).append(outcome.attained(slo))
    return {kind: mean(kinds[kind]) for kind in sorted(kinds, key=_by_size)}


def _by_size(kind: str) -> tuple[int, str]:
    width = kind.partition("x")[0]
    return int(width) if width.isdigit() else 0, kind


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
