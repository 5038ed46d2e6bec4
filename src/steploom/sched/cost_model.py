"""CostModel: the seconds of a tick by batch key and rows, learned from what the workers measure; and the knee."""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict, deque
from collections.abc import Mapping
from statistics import median
from typing import Any, cast

from steploom.protocol import RunnerOutput
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

UNTRIED = 16
"""Rows that a batch may have before anything was measured."""

FIXED = 0.3
"""Share of a tick that does not grow with its rows, where only one number of rows was measured."""

MAX_KEYS = 1024
"""Batch keys that are remembered; the one that was measured longest ago is forgotten first."""

DECAY = 0.99
"""What counts of what was known about the gain of sharing, at each tick that is looked at for it."""

SAMPLED = 8
"""Every so many ticks are looked at for it."""

MOST_TIMES = 4.0
"""An outlier counts as so many times what is usual, where sums are kept and not medians."""

KNOWN_ENDS = 4
"""Requests that must have ended before anybody says what is usual of their chores."""

VERSION = 1


def cost_key(batch_key: str) -> str:
    """What of a batch key says what a tick costs, in every process: module and sizes, without the running number."""
    return batch_key.rpartition("#")[0] or batch_key


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
    """Seconds of a tick by rows, of one batch key; and its bytes."""

    def __init__(self) -> None:
        self._samples: dict[int, deque[float]] = {}
        self._points: list[tuple[int, float]] | None = []
        self._knee: int | None = None
        self._age = 0
        self.limit = math.inf
        self._fine, self._wait = 0, RECOVERS
        self.chores_s = 0.0
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
        if rows >= 0.7 * self.limit:
            self._recover()
        self._age -= 1
        if self._age < 0:  # Medians are taken now and then, and at once for a new number of rows.
            self._points, self._age = None, min(4 * len(samples), 2 * SAMPLES)

    def overflowed(self, rows: int) -> None:
        """So many rows ran out of memory: batches have half as many for a while."""
        self.limit = max(1.0, min(self.limit, rows / 2))
        self._fine, self._wait = 0, min(2 * self._wait, MOST_WAIT)

    def _recover(self) -> None:
        """A tick with as many rows as may be went well. After enough of them there may be more."""
        self._fine += 1
        if self._fine >= self._wait:
            self._fine, self.limit = 0, self.limit * 1.25 + 1

    def observe_chores(self, seconds: float, ended: int) -> None:
        """Encoders and VAEs took so long in a tick in which so many requests ended. Old ticks count less and less."""
        if self._ended >= KNOWN_ENDS:  # one hiccup is not what they take
            seconds = min(seconds, MOST_TIMES * self.chores_s * max(1, ended))
        self._chores = 0.98 * self._chores + seconds
        self._ended = 0.98 * self._ended + ended
        self.chores_s = self._chores / max(self._ended, 1.0)

    @property
    def points(self) -> list[tuple[int, float]]:
        """Rows and seconds, as measured, but never less for more rows."""
        if self._points is None:
            self._points, most = [], 0.0
            for rows in sorted(self._samples):
                most = max(most, median(self._samples[rows]))
                self._points.append((rows, most))
            self._knee = _knee(self._points)
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
    def most(self) -> int:
        """The most rows that were measured; 0 if none were."""
        return self.points[-1][0] if self.points else 0

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
        chores, ended = map(float, state["chores"])
        if not (0 <= chores < math.inf and 0 <= ended < math.inf):
            raise ValueError(f"no seconds of text encoders and VAEs: {state['chores']}")
        curve._points = None
        curve.footprint = Footprint.of(state)
        curve._chores, curve._ended, curve.chores_s = chores, ended, chores / max(ended, 1.0)
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


class CostModel:
    """What ticks cost, by batch key and rows. It belongs to a scheduler, and learns from the answers of its workers.

    The cost of a tick is its seconds in the worker without warm-up, text encoders and VAEs: these are counted by
    themselves, for each request. Of each number of rows the median of the last measurements counts.

    Attributes:
        alone_s: Seconds that the ticks would have taken with one request in each.
        busy_s: Seconds that they took.
        limited: Whether any batch key has run out of memory.
        room_bytes: Memory that there is for requests, as a worker said last; 0 while nobody can say.
    """

    def __init__(self) -> None:
        self._curves: OrderedDict[str, Curve] = OrderedDict()
        self._names: dict[str, Curve] = {}
        self.alone_s = 0.0
        self.busy_s = 0.0
        self._ticks = 0
        self.limited = False
        self.room_bytes = 0

    def curve(self, batch_key: str) -> Curve:
        """What is known about a batch key, to learn more."""
        curve = self._names.get(batch_key)
        if curve is None:
            key = cost_key(batch_key)
            curve = self._curves.setdefault(key, Curve())
            if len(self._names) >= MAX_KEYS or len(self._curves) > MAX_KEYS:
                self._names.clear()
                while len(self._curves) > MAX_KEYS:
                    self._curves.popitem(last=False)
            self._names[batch_key] = curve
            self._curves.move_to_end(key)
        return curve

    def find(self, batch_key: str | None) -> Curve | None:
        """What is known about a batch key, if anything was measured."""
        curve = self._found(batch_key)
        return curve if curve is not None and curve.points else None

    def footprint(self, batch_key: str | None) -> Footprint | None:
        """What is known about its bytes; None if nothing was measured of the batch key."""
        curve = self._found(batch_key)
        return None if curve is None else curve.footprint

    def _found(self, batch_key: str | None) -> Curve | None:
        if batch_key is None:
            return None
        return self._names.get(batch_key) or self._curves.get(cost_key(batch_key))

    def seconds(self, batch_key: str, rows: int) -> float | None:
        """Seconds of a tick; None if nothing is known about the batch key."""
        curve = self.find(batch_key)
        return None if curve is None else curve.at(rows)

    def knee(self, batch_key: str) -> int | None:
        """Rows beyond which another row only makes everybody late; None while nobody can say."""
        curve = self.find(batch_key)
        return None if curve is None else curve.knee

    def cap(self, batch_key: str | None) -> float:
        """Rows that a batch may have: the knee, or where that is not known yet, twice what was measured."""
        curve = self.find(batch_key)
        if curve is None:
            return UNTRIED
        return curve.knee or max(UNTRIED, 2 * curve.most)

    def observe(self, batch_key: str | None, result: RunnerOutput, rows: int) -> None:
        """Takes note of a tick, unless there was warm-up in it.

        Args:
            batch_key: What its members had in common; None if that was not known when it was decided.
            result: The worker's answer.
            rows: Rows of all denoiser calls.
        """
        self.room_bytes = result.room_bytes or self.room_bytes
        if result.too_many_rows:
            self._overflowed(batch_key, result)
        if not rows or result.warmup_s:
            return
        if batch_key is None:
            keys = {report.batch_key for report in result.reports if report.batch_requests}
            batch_key = keys.pop() if len(keys) == 1 else None
        seconds = result.seconds - result.chores_s
        if batch_key is None or seconds <= 0:
            return
        curve = self._names.get(batch_key) or self.curve(batch_key)
        curve.observe(rows, seconds)
        curve.footprint.observe_tick(result, rows)
        ended = sum(report.finished for report in result.reports)
        if result.chores_s or ended:
            curve.observe_chores(result.chores_s, ended)
        self._ticks += 1
        if self._ticks % SAMPLED == 1:
            members = sum(report.batch_requests > 0 for report in result.reports)
            self.alone_s = DECAY * self.alone_s + members * curve.at(rows / members)
            self.busy_s = DECAY * self.busy_s + min(seconds, MOST_TIMES * curve.at(rows))

    def _overflowed(self, batch_key: str | None, result: RunnerOutput) -> None:
        self.limited = True
        keys = [batch_key] if batch_key else {report.batch_key for report in result.reports}
        for key in keys:
            if key is not None:
                self.curve(key).overflowed(result.too_many_rows)

    def limit(self, batch_key: str | None) -> float:
        """Rows that a batch may have, since more ran out of memory."""
        curve = None if batch_key is None else self._names.get(batch_key)
        return math.inf if curve is None else curve.limit

    @property
    def gain(self) -> float:
        """Seconds that a second's work would take one request at a time, since forwards are shared; 1 at first."""
        return self.alone_s / self.busy_s if self.alone_s > 0 and self.busy_s > 0 else 1.0

    def shown(self) -> list[Cost]:
        """All that is known, for people."""
        return [curve.shown(key) for key, curve in self._curves.items() if curve.points]

    def state(self) -> dict[str, Any]:
        """What another process needs to go on: plain, as JSON takes it."""
        curves = {key: curve.state() for key, curve in self._curves.items() if curve.points}
        return {"version": VERSION, "curves": curves, "gain": [self.alone_s, self.busy_s]}

    def restore(self, state: object) -> bool:
        """Goes on where another process was; whether that was possible. What was measured since counts as well."""
        try:
            told = cast("Mapping[str, Any]", state)
            if told["version"] != VERSION:
                return False
            curves = {str(key): Curve.of(curve) for key, curve in told["curves"].items()}
            alone_s, busy_s = map(float, told["gain"])
        except (KeyError, TypeError, ValueError, AttributeError):
            return False
        self._names.clear()
        for key, curve in curves.items():
            self._curves.setdefault(key, curve)
        self.alone_s, self.busy_s = self.alone_s + alone_s, self.busy_s + busy_s
        return True
