"""Share: who waits with one worker of a fleet; and the bounds of all that wait."""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import NamedTuple, Protocol

from steploom.requests import DiffusionRequest
from steploom.sched.books import Books
from steploom.sched.intake import Intake, Waits
from steploom.sched.lines import Rank
from steploom.sched.state import RequestState

SLACK = 64
"""Entries of requests that wait no more that a share may have, whatever its size."""

Place = tuple[int, bool, Rank, int]
"""Where a request stands among those that wait: class, replays first, the policy's rank, arrival."""


class Waiter(NamedTuple):
    """Who waits, where, and what that counts for: its standalone seconds as estimated last."""

    place: Place
    state: RequestState
    seconds: float


class Sharers(Waits, Protocol):
    """All who are alive in a fleet."""

    def __contains__(self, request_id: object) -> bool: ...

    @property
    def num_waiting(self) -> int:
        """How many of them wait."""
        ...

    def revalue(self, tick_s: float) -> None:
        """Estimates anew whom something new is known of, after a tick that took so long."""
        ...


class Whole(Intake):
    """The bounds of all that wait.

    Attributes:
        workers: How many serve.
    """

    workers = 1

    @property
    def gain(self) -> float:
        """Standalone seconds of work that all workers do in a second."""
        return super().gain * self.workers


class Share(Intake):
    """Who waits with one worker of a fleet, in order; the bounds are those of the fleet."""

    def __init__(self, fleet: Sharers, whole: Whole, scheduler: Books) -> None:
        super().__init__(scheduler.config, scheduler.demands, fleet)
        self._fleet = fleet
        self._whole = whole
        self._scheduler = scheduler
        self._waiting: dict[str, Waiter] = {}
        self._heap: list[tuple[Place, str]] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def check(self, request: DiffusionRequest, alive: object) -> None:
        """Refuses an id that is alive anywhere; see :meth:`Intake.check`."""
        self._whole.check(request, self._fleet)

    def admit(self, state: RequestState, waiting: int) -> None:
        """Bounds what waits in all; see :meth:`Intake.admit`."""
        self._whole.admit(state, self._fleet.num_waiting)

    def inherit(self, other: Intake) -> None:
        """What ``other`` knows, the whole knows."""
        self._whole.inherit(other)

    @property
    def stale(self) -> bool:
        """As :attr:`Intake.stale`, of the whole."""
        return self._whole.stale

    def learned(self, alive: object, tick_s: float) -> list[RequestState]:
        """Has some estimated anew, wherever they wait; nobody is left for the scheduler to tell its policy of."""
        self._fleet.revalue(tick_s)
        return []

    def revalue(self, states: list[RequestState]) -> None:
        """Gives those of ``states`` new places that wait here, and tells the policy."""
        self._scheduler.policy.revalue(states)
        for state in states:
            found = self._waiting.get(state.run_id)
            if found is not None:
                self.queued_s += state.standalone_s - found.seconds
                self._place(state)

    def enters(self, state: RequestState) -> None:
        """``state`` waits from now on."""
        super().enters(state)
        self._whole.enters(state)
        self._place(state)

    def _place(self, state: RequestState) -> None:
        place = state.priority, not state.attempt, self._scheduler.policy.rank(state), state.arrival
        self._waiting[state.run_id] = Waiter(place, state, state.standalone_s)
        heappush(self._heap, (place, state.run_id))

    def leaves(self, state: RequestState, waiting: int) -> None:
        """``state`` waits no more."""
        del self._waiting[state.run_id]
        super().leaves(state, len(self._waiting))
        self._whole.leaves(state, self._fleet.num_waiting)
        if len(self._heap) > 2 * len(self._waiting) + SLACK:
            self._heap = [entry for entry in self._heap if self._holds(entry)]
            heapify(self._heap)

    def first(self) -> Waiter | None:
        """The first of those that may wait elsewhere; None if there is none."""
        if self._scheduler.tries:
            return min((found for found in self._waiting.values() if self._may_move(found.state)), default=None)
        heap = self._heap
        while heap and not self._holds(heap[0]):
            heappop(heap)
        return self._waiting[heap[0][1]] if heap else None

    def _holds(self, entry: tuple[Place, str]) -> bool:
        """Whether it waits, and at that place."""
        found = self._waiting.get(entry[1])
        return found is not None and found.place == entry[0]

    def best(self, most: int) -> list[Place]:
        """The places of the first ones."""
        heap, found = self._heap, dict[str, Place]()
        while heap and len(found) < most:
            entry = heappop(heap)
            if self._holds(entry):
                found[entry[1]] = entry[0]
        for run, place in found.items():
            heappush(heap, (place, run))
        return list(found.values())

    def movable(self) -> list[RequestState]:
        """All that may wait elsewhere, in order."""
        return [one.state for one in sorted(self._waiting.values()) if self._may_move(one.state)]

    def _may_move(self, state: RequestState) -> bool:
        return not self._scheduler.confines(state.request_id)
