"""Line: the requests of one group that wait, by class, by user, and by the policy's rank."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

from steploom.sched.ascending import Ascending
from steploom.sched.ledger import Ledger
from steploom.sched.state import RequestState
from steploom.sched.turns import Turns

SLACK = 64
"""Entries of requests that left a queue may have, whatever its size."""

RESERVE = 16
"""Every so many of a user's requests the one that has waited longest is next, whatever its rank."""

RISING = 64
"""Requests that rise to the next class at one time: where more have waited for long, the others do at later ones."""

Rank = tuple[float, ...]
"""A policy's order of waiting requests: the lowest is next."""


Place = tuple[bool, Rank, int, str]
"""Whether behind those that are replayed, rank, arrival, run id."""


class Order(NamedTuple):
    """What a line asks its policy.

    Attributes:
        rank: Of a request; it changes only when more is known of it (:meth:`Line.revalue`).
        late: Whether it cannot be done in time any more: then it goes behind those that can.
        ledger: What users have had.
        ageing_s: Seconds after which a waiting request rises to the next class.
    """

    rank: Callable[[RequestState], Rank]
    late: Callable[[RequestState, float], bool]
    ledger: Ledger
    ageing_s: float


class Waiting:
    """A user's waiting requests of one class: by rank, and by age. An entry that is nobody's any more is skipped.

    By rank, that is one that is not the ``place`` of its request.
    """

    __slots__ = ("ages", "ranks", "states", "taken", "user")

    def __init__(self, user: str) -> None:
        self.user = user
        self.states: dict[str, RequestState] = {}
        self.ranks: Ascending[Place] = Ascending()
        self.ages: Ascending[tuple[int, str]] = Ascending()  # By arrival.
        self.taken = 0

    def push(self, state: RequestState, order: Order, front: bool) -> None:
        """``state`` waits from now on; by age before those that came later, as one that has risen to this class."""
        self.states[state.run_id] = state
        self.rank(state, order, front)
        self.ages.push((state.arrival, state.run_id))
        if len(self.ages) > 2 * len(self.states) + SLACK:
            self.ages.keep(lambda age: age[1] in self.states)

    def rank(self, state: RequestState, order: Order, front: bool) -> None:
        """Gives ``state`` its place by rank, or another one."""
        place = (not front, order.rank(state), state.arrival, state.run_id)
        if state.place == place:
            return
        state.place = place
        self.ranks.push(place)
        if len(self.ranks) > 2 * len(self.states) + SLACK:
            self.ranks.keep(lambda one: one[3] in self.states and self.states[one[3]].place is one)

    def first(self, order: Order, now: float) -> RequestState:
        """The next one; there must be one. Those that are late lose their rank: their turn comes by age."""
        one = self.ranks.first()
        while one is not None:
            state = self.states.get(one[3])
            if state is not None and state.place is one:
                if not one[0] or not order.late(state, now):
                    if not one[0] or self.taken % RESERVE != RESERVE - 1:
                        return state
                    break
                state.place = None
            one = self.ranks.drop()
        return self._oldest()

    def _oldest(self) -> RequestState:
        age = self.ages.first()
        while age is not None:
            if (state := self.states.get(age[1])) is not None:
                return state
            age = self.ages.drop()
        raise AssertionError("nobody waits")


class Line:
    """The requests of one group that wait. The lowest class is first, then whose turn it is among the users.

    Args:
        order: The policy's.

    Attributes:
        priority: The class that is next; above all if nobody waits.
        waiting: Of each that waits, by run id, its class and queue.
    """

    def __init__(self, order: Order) -> None:
        self.priority = math.inf
        self._order = order
        self._classes: dict[int, Turns[Waiting]] = {}
        self._numbers: list[int] = []
        self._ages: deque[tuple[float, str]] = deque()
        self._aged = -math.inf
        self.waiting: dict[str, tuple[int, Waiting]] = {}
        self._sole: Waiting | None = None

    def __len__(self) -> int:
        return len(self.waiting)

    def push(self, state: RequestState, *, front: bool = False) -> None:
        """``state`` waits from now on; with ``front`` before all others of its user and class."""
        self._put(state, state.priority, state.submitted, front)

    def _put(self, state: RequestState, number: int, since: float, front: bool) -> None:
        one = self._classes.get(number)
        if one is None:
            one = self._classes[number] = Turns(self._order.ledger)
            insort(self._numbers, number)
            self.priority = self._numbers[0]
        waiting = one.get(state.user)
        if waiting is None:
            waiting = one.add(state.user, Waiting(state.user))
            self._find_sole()
        waiting.push(state, self._order, front)
        self.waiting[state.run_id] = (number, waiting)
        self._ages.append((since, state.run_id))
        if len(self._ages) > 2 * len(self.waiting) + SLACK:
            self._ages = deque(age for age in self._ages if age[1] in self.waiting)

    def remove(self, state: RequestState) -> int:
        """``state`` waits no more. Its class. O(1) on average."""
        run_id = state.run_id
        number, waiting = self.waiting.pop(run_id)
        del waiting.states[run_id]
        state.place = None
        if not waiting.states:
            self._close(number, waiting.user)
        return number

    def abandon(self, state: RequestState) -> None:
        """The only one waits no more, and nobody ever will: the line goes with its group, and is not put in order."""
        self.waiting.clear()
        state.place = None

    def _close(self, number: int, user: str) -> None:
        """Nobody of that class and user waits."""
        one = self._classes[number]
        one.remove(user)
        if not len(one):
            del self._classes[number]
            del self._numbers[bisect_left(self._numbers, number)]
            self.priority = self._numbers[0] if self._numbers else math.inf
        self._find_sole()

    def _find_sole(self) -> None:
        """Notes whether there is but one queue, which is next whatever was had and how long anybody has waited."""
        turns = next(iter(self._classes.values())) if len(self._classes) == 1 else ()
        self._sole = next(iter(turns)) if len(turns) == 1 else None

    def heir(self, state: RequestState, number: int, now: float) -> RequestState | None:
        """The next one of that class and of the user of ``state``."""
        turns = self._classes.get(number)
        waiting = None if turns is None else turns.get(state.user)
        return None if waiting is None else waiting.first(self._order, now)

    def fronts(self, now: float) -> list[RequestState]:
        """The next one of each class and user."""
        return [one.first(self._order, now) for turns in self._classes.values() for one in turns]

    def revalue(self, state: RequestState) -> None:
        """The rank of ``state`` has changed."""
        self.waiting[state.run_id][1].rank(state, self._order, front=bool(state.attempt))

    def reorder(self) -> None:
        """What users have had was counted anew."""
        for turns in self._classes.values():
            turns.reorder()

    def first(self, now: float) -> RequestState:
        """The request that is next; there must be one. Asked again, it is the same one, until something changes."""
        return (self._sole or self._next(now)).first(self._order, now)

    def pop(self, now: float) -> RequestState:
        """Takes out the request that is next."""
        waiting = self._sole or self._next(now)
        state = waiting.first(self._order, now)
        waiting.taken += 1
        self.remove(state)
        return state

    def _next(self, now: float) -> Waiting:
        if len(self._classes) > 1 and now > self._aged:
            self._aged = now
            self._age(now)
        waiting = self._classes[self._numbers[0]].first()
        assert waiting is not None, "nobody waits"
        return waiting

    def find(self, run_id: str) -> tuple[RequestState, int] | None:
        """The request of that run id and its class, if it waits here."""
        place = self.waiting.get(run_id)
        return None if place is None else (place[1].states[run_id], place[0])

    def states(self) -> Iterator[RequestState]:
        """Everybody, in no order."""
        return (s for one in self._classes.values() for waiting in one for s in waiting.states.values())

    def drain(self) -> list[RequestState]:
        """Takes out everybody, in order of arrival."""
        states = list(self.states())
        self._classes.clear()
        self._numbers.clear()
        self._ages.clear()
        self.waiting.clear()
        self.priority, self._sole = math.inf, None
        for state in states:
            state.place = None
        return sorted(states, key=lambda state: state.arrival)

    def _age(self, now: float) -> None:
        """Those that have waited for long in their class rise to the next one, ``RISING`` of them at most."""
        ages, numbers, risen = self._ages, self._numbers, 0
        while ages and (now - ages[0][0] >= self._order.ageing_s or ages[0][1] not in self.waiting):
            if risen == RISING:
                return
            _, run = ages.popleft()
            found = self.find(run)
            if found is None:
                continue
            risen += 1
            state, number = found
            if number == numbers[0]:
                ages.append((now, run))
                continue
            better = numbers[bisect_left(numbers, number) - 1]
            self.remove(state)
            state.priority = better
            self._put(state, better, now, front=False)
