"""Flights: the ticks that were sent and whose answers were not taken note of yet."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import anyio

from steploom.protocol import RunnerOutput, SchedulerOutput


class Flight:
    """A tick on its way.

    Attributes:
        output: As it was sent.
        sent: When, by ``time.monotonic()``.
        amendments: What was added to it since, in order.
        result: The answer, once it is there.
    """

    __slots__ = ("amendments", "output", "result", "sent")

    def __init__(self, output: SchedulerOutput) -> None:
        self.output = output
        self.sent = time.monotonic()
        self.amendments: list[SchedulerOutput] = []
        self.result: RunnerOutput | None = None


class Landing(NamedTuple):
    """A tick that is over: as it was executed, its answer, and when it began and ended, as seen from here."""

    output: SchedulerOutput
    result: RunnerOutput
    began: float
    ended: float


class Flights:
    """Ticks in flight, in order, at most ``most``: one that runs, and one that is there when it ends."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._flights: deque[Flight] = deque()
        self._landed = 0.0
        self._changed = anyio.Event()

    def __len__(self) -> int:
        return len(self._flights)

    def forget(self) -> None:
        """None of them will land."""
        self._flights.clear()

    def look_again(self) -> None:
        """There may be something to amend."""
        self._changed.set()

    async def amendable(self) -> Flight:
        """Returns when something has changed, and the tick that was sent last has another one before it."""
        while True:
            await self._changed.wait()
            self._changed = anyio.Event()
            if len(self._flights) > 1:
                return self._flights[-1]

    def depart(self, output: SchedulerOutput) -> Flight:
        """``output`` is sent now."""
        assert len(self._flights) < self.most
        flight = Flight(output)
        self._flights.append(flight)
        return flight

    def land(self) -> Iterator[Landing]:
        """Takes out those that are answered, as far as those before them are."""
        while self._flights and (result := self._flights[0].result) is not None:
            flight = self._flights.popleft()
            output = flight.output
            for amendment in flight.amendments[: result.amendments]:
                output = output.amended(amendment)
            ended = time.monotonic()
            # It waited for the one before it; but that one's answer may have lain here for a while, unread.
            began = min(max(flight.sent, self._landed), ended - result.seconds)
            self._landed = ended
            yield Landing(output, result, began, ended)
