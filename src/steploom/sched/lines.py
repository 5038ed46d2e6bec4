"""Line: the requests of one group that wait, by class, by user, and by the policy's rank."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from heapq import heapify, heappop, heappush
from itertools import count
from typing import NamedTuple

from steploom.sched.state import RequestState

SLACK = 64
"""Entries of requests that left a heap may have, whatever its size."""

RESERVE = 16
"""Every so many of a user's requests the one that has waited longest is next, whatever its rank."""

Rank = tuple[float, ...]
"""A policy's order of waiting requests: the lowest is next."""


class Order(NamedTuple):
    """What a line asks its policy.

    Attributes:
        rank: Of a request; it does not change while the request waits.
        late: Whether it cannot be done in time any more: then it goes behind those that can.
        charge: Seconds that its user is charged for it.
        weights: Of users, where they differ.
        ageing_s: Seconds after which a waiting request rises to the next class.
    """

    rank: Callable[[RequestState], Rank]
    late: Callable[[RequestState, float], bool]
    charge: Callable[[RequestState], float]
    weights: Mapping[str, float]
    ageing_s: float


class Waiting:
    """A user's waiting requests of one class: by rank, and by age. An entry of one that left is skipped."""

    __slots__ = ("ages", "credit", "heap", "states", "taken")

    def __init__(self) -> None:
        self.states: dict[str, RequestState] = {}
        self.heap: list[tuple[bool, Rank, int, str]] = []
        self.ages: deque[str] = deque()
        self.credit = 0.0
        self.taken = 0

    def push(self, state: RequestState, order: Order, front: bool) -> None:
        """``state`` waits from now on; by age before those that came later, as one that has risen to this class."""
        self.states[state.run_id] = state
        heappush(self.heap, (not front, order.rank(state), state.arrival, state.run_id))
        place = len(self.ages)
        last = self.states.get(self.ages[-1]) if self.ages else None
        if last is not None and last.arrival > state.arrival:
            older = (i for i, run in enumerate(self.ages) if run in self.states)
            place = next((i for i in older if self.states[self.ages[i]].arrival > state.arrival), place)
        self.ages.insert(0 if front else place, state.run_id)
        if len(self.ages) > 2 * len(self.states) + SLACK:
            self.ages = deque(run for run in self.ages if run in self.states)
            self.heap = [entry for entry in self.heap if entry[3] in self.states]
            heapify(self.heap)

    def first(self, order: Order, now: float) -> RequestState:
        """The next one; there must be one. Those that are late leave the heap: their turn comes by age."""
        heap, states = self.heap, self.states
        while heap:
            ahead, _, _, run = heap[0]
            state = states.get(run)
            if state is not None and not (ahead and order.late(state, now)):
                break
            heappop(heap)
        while self.ages[0] not in states:
            self.ages.popleft()
        by_age = not heap or (heap[0][0] and self.taken % RESERVE == RESERVE - 1)
        return states[self.ages[0] if by_age else heap[0][3]]


class Class:
    """The waiting requests of one priority, of users in turn: deficit round robin, in seconds.

    M. Shreedhar and G. Varghese, "Efficient Fair Queuing using Deficit Round Robin", SIGCOMM 1995: a user whose turn it
    is may spend its credit; then it gets a quantum, and the next one has its turn. Who has nothing left to wait for
    loses its credit. The quantum is the dearest request that was seen, so that each turn lets someone in.
    """

    __slots__ = ("quantum", "users")

    def __init__(self) -> None:
        self.users: OrderedDict[str, Waiting] = OrderedDict()
        self.quantum = 1e-3

    def first(self, order: Order, now: float) -> tuple[str, RequestState]:
        """The user whose turn it is, and the next of its requests."""
        for turn in count():
            if turn == len(self.users):
                self._skip_rounds(order, now)
            user, waiting = next(iter(self.users.items()))
            state = waiting.first(order, now)
            cost = order.charge(state)
            if len(self.users) == 1 or cost <= waiting.credit:
                return user, state
            self.quantum = max(self.quantum, cost)
            self.users.move_to_end(user)
            waiting.credit += self.quantum * order.weights.get(user, 1.0)
        raise AssertionError("unreachable")

    def _skip_rounds(self, order: Order, now: float) -> None:
        """Nobody could spend anything in a round: as many as it takes until somebody can, at once."""
        quanta = {user: self.quantum * order.weights.get(user, 1.0) for user in self.users}
        short = {user: order.charge(one.first(order, now)) - one.credit for user, one in self.users.items()}
        rounds = min(math.ceil(short[user] / quanta[user]) for user in quanta) - 1
        for user, waiting in self.users.items():
            waiting.credit += max(0, rounds) * quanta[user]


class Line:
    """The requests of one group that wait. The lowest class is first, then whose turn it is among the users.

    Args:
        order: The policy's.
    """

    def __init__(self, order: Order) -> None:
        self._order = order
        self._classes: dict[int, Class] = {}
        self._numbers: list[int] = []
        self._ages: deque[tuple[float, str]] = deque()
        self._where: dict[str, tuple[int, str]] = {}

    def __len__(self) -> int:
        return len(self._where)

    def push(self, state: RequestState, *, front: bool = False) -> None:
        """``state`` waits from now on; with ``front`` before all others of its user and class."""
        self._put(state, state.priority, state.submitted, front)

    def _put(self, state: RequestState, number: int, since: float, front: bool) -> None:
        user = state.request.user or ""
        one = self._classes.get(number)
        if one is None:
            one = self._classes[number] = Class()
            insort(self._numbers, number)
        waiting = one.users.get(user)
        if waiting is None:
            waiting = one.users[user] = Waiting()
        waiting.push(state, self._order, front)
        self._where[state.run_id] = (number, user)
        self._ages.append((since, state.run_id))
        if len(self._ages) > 2 * len(self._where) + SLACK:
            self._ages = deque(age for age in self._ages if age[1] in self._where)

    def remove(self, state: RequestState) -> None:
        """``state`` waits no more. O(1) on average."""
        number, user = self._where.pop(state.run_id)
        one = self._classes[number]
        waiting = one.users[user]
        del waiting.states[state.run_id]
        if not waiting.states:
            del one.users[user]
            if not one.users:
                del self._classes[number]
                del self._numbers[bisect_left(self._numbers, number)]

    def first(self, now: float) -> RequestState:
        """The request that is next; there must be one. Asked again, it is the same one, until something changes."""
        if len(self._classes) > 1:
            self._age(now)
        return self._classes[self._numbers[0]].first(self._order, now)[1]

    def pop(self, now: float) -> RequestState:
        """Takes out the request that is next."""
        if len(self._classes) > 1:
            self._age(now)
        one = self._classes[self._numbers[0]]
        user, state = one.first(self._order, now)
        waiting = one.users[user]
        waiting.credit = max(0.0, waiting.credit - self._order.charge(state))
        waiting.taken += 1
        self.remove(state)
        return state

    def find(self, run_id: str) -> tuple[RequestState, int] | None:
        """The request of that run id and its class, if it waits here."""
        place = self._where.get(run_id)
        if place is None:
            return None
        return self._classes[place[0]].users[place[1]].states[run_id], place[0]

    @property
    def priority(self) -> int:
        """The class that is next; something must wait."""
        return self._numbers[0]

    def states(self) -> list[RequestState]:
        """Everybody, in no order."""
        return [s for one in self._classes.values() for waiting in one.users.values() for s in waiting.states.values()]

    def drain(self) -> list[RequestState]:
        """Takes out everybody, in order of arrival."""
        states = self.states()
        self._classes.clear()
        self._numbers.clear()
        self._ages.clear()
        self._where.clear()
        return sorted(states, key=lambda state: state.arrival)

    def _age(self, now: float) -> None:
        """Those that have waited for long in their class rise to the next one."""
        ages, numbers = self._ages, self._numbers
        while ages and (now - ages[0][0] >= self._order.ageing_s or ages[0][1] not in self._where):
            _, run = ages.popleft()
            found = self.find(run)
            if found is None:
                continue
            state, number = found
            if number == numbers[0]:
                ages.append((now, run))
                continue
            better = numbers[bisect_left(numbers, number) - 1]
            self.remove(state)
            state.priority = better
            self._put(state, better, now, front=False)
