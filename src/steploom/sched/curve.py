"""Curve: the seconds of a tick by rows, learned from measurements; and the knee."""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

from steploom.sched.footprint import Footprint

SAMPLES = 15
"""Measurements of one number of rows that are kept: their median is the cost, so seven outliers do no harm."""

KNEE_SHARE = 0.9
"""The knee is where so much of the best throughput is reached."""

CLIMBS = 1.05
"""If twice the rows gave so many times the throughput, the knee may lie beyond what was measured."""

RECOVERS = 32
"""Ticks that have to go well before a batch that ran out of memory may grow; twice as many each time that it does."""

MOST_WAIT = 4096
"""Such ticks, at most."""

TRIED = 4
"""Times the fewest rows that are tried before anything is said about the knee."""

SURE = 3
"""Measurements that a number of rows needs before the knee rests on it, or twice as many are tried: one may be off."""

AGAIN = 512
"""Full batches after which more rows than the knee are tried again; each time that the knee stays, twice as many."""

MOST_AGAIN = 16384
"""Such batches, at most."""

FIXED = 0.3
"""Share of a tick that does not grow with its rows, where only one number of rows was measured."""

MOST_TIMES = 4.0
"""An outlier counts as so many times what is usual, where sums are kept and not medians."""

KNOWN_ENDS = 4
"""Requests that must have ended before anybody says what is usual of their chores."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """What is known about the ticks of one batch key.

    Attributes:
        batch_key: Module and sizes that the requests share.
        seconds: Seconds of a tick, by rows.
        samples: Measurements that each rests on.
        knee: Rows beyond which another row only makes everybody late; None while nobody can say.
        chores_s: Seconds that a request's text encoders and VAEs take.
        held_bytes: Bytes that a request keeps between steps, by its rows; 0 while nobody can say.
        peak_bytes: Bytes of device memory that a tick takes on top of that, by its rows; likewise.
    """

    batch_key: str
    seconds: dict[int, float]
    samples: dict[int, int]
    knee: int | None
    chores_s: float
    held_bytes: float = 0.0
    peak_bytes: float = 0.0


class Curve:
    """Seconds of a tick by rows, of one batch key; and its bytes.

    Attributes:
        measured: Ticks that were measured.
        limit: Rows that a batch may have, since more ran out of memory.
        chores_s: Seconds of text encoders and VAEs of a request.
        most_chores_s: What these were not above since they were far below, or above what was given here before.
        footprint: Its bytes.
    """

    def __init__(self) -> None:
        self._samples: dict[int, deque[float]] = {}
        self._points: list[tuple[int, float]] | None = []
        self._knee: int | None = None
        self._most = 0
        self._full, self._again = 0, AGAIN  # Full batches since more rows were tried, and until they are.
        self._tried: list[float] | None = None  # Of the rows that are tried again, if any are.
        self._age = 0
        self.measured = 0
        self.limit = math.inf
        self._fine, self._wait = 0, RECOVERS
        self.chores_s = self.most_chores_s = 0.0
        self._ended = 0.0
        self._chores = 0.0
        self.footprint = Footprint()

    def observe(self, rows: int, seconds: float) -> None:
        """A tick with so many rows took so long."""
        samples = self._samples.get(rows)
        if samples is None:
            samples = self._samples[rows] = deque(maxlen=SAMPLES)
            self._age = 0
        samples.append(seconds)
        self.measured += 1
        if 2 * rows > self.limit:  # no batch to which one more like its members does not fit has fewer
            self._recover()
        if self._knee is not None:
            self._try_again(rows)
        self._age -= 1
        if self._age < 0:  # Medians are taken now and then, and at once for a new number of rows.
            self._points, self._age = None, min(4 * len(samples) - 4, 2 * SAMPLES)

    def _try_again(self, rows: int) -> None:
        """Now and then batches may be larger than the knee: what it rests on may have been a bad moment."""
        knee = self._knee or 1
        if self._tried is None:
            self._full += rows >= 0.7 * knee
            if self._full >= self._again:
                self._full, self._tried = 0, []
        elif rows > knee:
            self._tried.append(rows)
            if len(self._tried) >= SURE:
                self._tried, self._points = None, None
                self._again = min(2 * self._again, MOST_AGAIN) if self.knee == knee else AGAIN

    def overflowed(self, rows: int) -> None:
        """So many rows ran out of memory: batches have half as many for a while."""
        self._wait = RECOVERS if self.limit == math.inf else min(2 * self._wait, MOST_WAIT)
        self._fine, self.limit = 0, max(1.0, min(self.limit, rows / 2))

    def _recover(self) -> None:
        """A tick with as many rows as may be went well. After enough of them there may be more."""
        self._fine += 1
        if self._fine >= self._wait:
            self._fine, self.limit = 0, self.limit * 1.25 + 1

    def observe_chores(self, seconds: float, ended: int) -> bool:
        """Encoders and VAEs took so long in a tick in which so many requests ended. Old ticks count less and less.

        Returns:
            Whether they take longer than :attr:`most_chores_s` said.
        """
        if self._ended >= KNOWN_ENDS:  # one hiccup is not what they take
            seconds = min(seconds, MOST_TIMES * self.chores_s * max(1, ended))
        self._chores = 0.98 * self._chores + seconds
        self._ended = 0.98 * self._ended + ended
        self.chores_s = self._chores / max(self._ended, 1.0)
        return self._bound_chores()

    def _bound_chores(self) -> bool:
        """Whether they take longer than :attr:`most_chores_s` said."""
        most = self.most_chores_s
        if not most / 2 <= self.chores_s <= most:
            self.most_chores_s = 1.25 * self.chores_s
        return self.chores_s > most

    @property
    def changed(self) -> bool:
        """Whether the medians are to be taken anew."""
        return self._points is None

    @property
    def points(self) -> list[tuple[int, float]]:
        """Rows and seconds, as measured, but never less for more rows."""
        if self._points is None:
            self._points, most = [], 0.0
            for rows in sorted(self._samples):
                most = max(most, median(self._samples[rows]))
                self._points.append((rows, most))
            sure = [point for point in self._points if len(self._samples[point[0]]) >= SURE]
            self._knee, self._most = _knee(sure), sure[-1][0] if sure else 0
        return self._points

    def at(self, rows: float) -> float:
        """Seconds with so many rows: between what was measured, or beyond it in a straight line."""
        points = self.points
        if len(points) == 1:
            known, seconds = points[0]
            return seconds * (FIXED + (1 - FIXED) * rows / known)
        low, fast = points[0]
        return max(_line(points, rows), fast * min(1.0, rows / low))

    @property
    def knee(self) -> int | None:
        """Rows beyond which another row only makes everybody late; None while nobody can say."""
        return self._knee if self.points else None

    @property
    def cap(self) -> float:
        """Rows that a batch may have: the knee; twice as many while it is tried again, or as were measured."""
        knee = self.knee
        if knee is None:
            return max(1, 2 * self.most)
        return knee if self._tried is None else 2 * knee

    @property
    def most(self) -> int:
        """The most rows that were measured often enough; 0 if none were."""
        return self._most if self.points else 0

    def shown(self, key: str) -> Cost:
        """What is known, for people."""
        self._points = None  # as of now
        samples = {rows: len(values) for rows, values in sorted(self._samples.items())}
        held, peak = self.footprint.held, self.footprint.step
        return Cost(key, dict(self.points), samples, self.knee, self.chores_s, held, peak)

    def state(self) -> dict[str, Any]:
        """What another process needs to go on."""
        seconds = {str(rows): list(values) for rows, values in self._samples.items()}
        return {"seconds": seconds, "chores": [self._chores, self._ended], "bytes": self.footprint.state()}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Curve:
        """The curve that :meth:`state` told of."""
        curve = cls()
        for rows, values in state["seconds"].items():
            samples = deque(map(float, values), maxlen=SAMPLES)
            if int(rows) < 1 or not samples or not all(0 < seconds < math.inf for seconds in samples):
                raise ValueError(f"rows {rows}: no seconds of ticks: {values}")
            curve._samples[int(rows)] = samples
            curve.measured += len(samples)
        chores, ended = map(float, state["chores"])
        if not (0 <= chores < math.inf and 0 <= ended < math.inf):
            raise ValueError(f"no seconds of text encoders and VAEs: {state['chores']}")
        curve._points = None
        curve.footprint = Footprint.of(state)
        curve._chores, curve._ended, curve.chores_s = chores, ended, chores / max(ended, 1.0)
        curve._bound_chores()
        return curve


def _knee(points: list[tuple[int, float]]) -> int | None:
    """The fewest rows with most of the best throughput that was measured; None while it is still growing."""
    least, most = (points[0][0], points[-1][0]) if points else (1, 1)
    if most < TRIED * least:
        return None
    throughput = {rows: rows / _line(points, rows) for rows in range(least, most + 1)}
    if throughput[most] >= CLIMBS * throughput[max(least, most // 2)]:
        return None
    best = max(throughput.values())
    return next(rows for rows in throughput if throughput[rows] >= KNEE_SHARE * best)


def _line(points: list[tuple[int, float]], rows: float) -> float:
    """Seconds on the straight line between the two points around so many rows, or through the outermost two."""
    above = next((i for i, point in enumerate(points) if point[0] >= rows), len(points) - 1)
    (low, fast), (high, slow) = points[max(above, 1) - 1], points[max(above, 1)]
    return fast + (slow - fast) * (rows - low) / (high - low)
