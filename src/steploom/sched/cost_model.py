"""CostModel: the seconds of a tick by batch key and rows, learned from what the workers measure; and the knee."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, cast

from steploom.protocol import RunnerOutput
from steploom.sched.curve import MOST_TIMES, SURE, Cost, Curve
from steploom.sched.footprint import Footprint

MAX_KEYS = 1024
"""Batch keys that are remembered; the one that was measured longest ago is forgotten first."""

DECAY = 0.99
"""What counts of what was known about the gain of sharing, at each tick that is looked at for it."""

SAMPLED = 8
"""Every so many ticks are looked at for it."""

VERSION = 1


def cost_key(batch_key: str) -> str:
    """What of a batch key says what a tick costs, in every process: module and sizes, without the running number."""
    return batch_key.rpartition("#")[0] or batch_key


class CostModel:
    """What ticks cost, by batch key and rows. It belongs to a scheduler, and learns from the answers of its workers.

    The cost of a tick is its seconds in the worker without warm-up, text encoders and VAEs: these are counted by
    themselves, for each request. Of each number of rows the median of the last measurements counts.

    Attributes:
        alone_s: Seconds that the ticks would have taken with one request in each.
        busy_s: Seconds that they took.
        limited: Whether any batch key has run out of memory.
        room_bytes: Memory that there is for requests, as a worker said last; 0 while nobody can say.
        version: Another number whenever a cost may have changed.
        fresh: Of batch keys that were measured for the first time, or often enough, the part that says what they cost.
    """

    def __init__(self) -> None:
        self._curves: OrderedDict[str, Curve] = OrderedDict()
        self._names: dict[str, Curve] = {}
        self.alone_s = 0.0
        self.busy_s = 0.0
        self._ticks = 0
        self.limited = False
        self.room_bytes = 0
        self.version = 0
        self.fresh: list[str] = []

    def curve(self, batch_key: str) -> Curve:
        """What is known about a batch key, to learn more."""
        curve = self._names.get(batch_key)
        if curve is None:
            key = cost_key(batch_key)
            curve = self._curves.setdefault(key, Curve())
            if len(self._names) >= MAX_KEYS or len(self._curves) > MAX_KEYS:
                self._names.clear()
                self._curves.move_to_end(key)
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
        """Rows that a batch may have: the knee, or where that is not known yet, twice what was measured.

        Before anything was measured that is one request, so that few rows are tried before many also where many wait.
        """
        curve = self.find(batch_key)
        return 1 if curve is None else curve.cap

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
        self.version += curve.changed
        if curve.measured in (1, SURE):
            self.fresh.append(cost_key(batch_key))
        curve.footprint.observe_tick(result, rows)
        ended = sum(report.finished for report in result.reports)
        if result.chores_s or ended:
            self.version += curve.observe_chores(result.chores_s, ended)
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
        self.version += 1
        for key, curve in curves.items():
            self._curves.setdefault(key, curve)
        self.alone_s, self.busy_s = self.alone_s + alone_s, self.busy_s + busy_s
        return True
