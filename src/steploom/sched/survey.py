"""Survey: those that waited at one time, summed up, so that it is found fast what goes before a request that comes."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import accumulate, groupby
from operator import itemgetter, mul

from steploom.sched.ledger import Account
from steploom.sched.lines import Order, Rank
from steploom.sched.state import RequestState

SHARE = 16
"""It holds until one of so many has come or left."""

LASTS_S = 1.0
"""It holds for so long at most: who can be done in time now is late some time."""

STEADY = 0.95
"""It holds for requests that gain at least so many times as much by sharing: the more, the fewer are late."""


class Part:
    """Those of one user and class.

    Attributes:
        start: The number of the first among those of all users.
        end: The number behind the last.
        seconds: What they take.
        account: What the user has had since.
        had: What it had had before.
        gone_s: What those of it took that had left before.
    """

    __slots__ = ("account", "end", "gone_s", "had", "seconds", "start")

    def __init__(self, start: int, end: int, seconds: float, account: Account) -> None:
        self.start, self.end, self.seconds = start, end, seconds
        self.account, self.had, self.gone_s = account, account.seconds, account.gone_s

    def left_s(self, account: Account | None) -> float:
        """What those take that may have left since. ``account``: the user's, if somebody of it waits."""
        return self.account.gone_s - self.gone_s if account is self.account else math.inf


class Crowd:
    """Those of one class, by user and in order. No request is kept, since it may hold large pictures."""

    def __init__(self, states: Sequence[RequestState], order: Order, now: float, gain: float) -> None:
        self._order = order
        self.count, self.seconds = len(states), 0.0
        self._keys: list[tuple[Rank, float]] = []
        self._counts: list[int] = []  # Of the same user, those before it that are in time; and what they take.
        self._sums: list[float] = []
        self._parts: dict[str, Part] = {}
        # Arrivals differ, so states are not compared.
        ranked = sorted([(state.user, order.rank(state), state.arrival, state) for state in states])
        for user, own in groupby(ranked, itemgetter(0)):
            start, count, in_time_s, seconds = len(self._keys), 0, 0.0, 0.0
            for _, rank, arrival, state in own:
                self._add((rank, arrival), count, in_time_s)
                seconds += state.standalone_s
                if not order.late(state, now + in_time_s / gain):
                    count, in_time_s = count + 1, in_time_s + state.standalone_s
            self._parts[user] = Part(start, len(self._keys), seconds, order.ledger.accounts[user])
            self._add(((), math.inf), count, in_time_s)
            self.seconds += seconds
        self._bend()

    def _add(self, key: tuple[Rank, float], count: int, seconds: float) -> None:
        self._keys.append(key)
        self._counts.append(count)
        self._sums.append(seconds)

    def _bend(self) -> None:
        """Of each user what it has had from some turn on goes before that, up to all that it has: straight lines."""
        bends: list[tuple[float, float, float]] = []
        for user, part in self._parts.items():
            if part.seconds > 0:
                weight = self._order.ledger.weights.get(user, 1.0)
                requests = weight * (part.end - part.start) / part.seconds
                bends.append((part.had, requests, weight))
                bends.append((part.had + part.seconds / weight, -requests, -weight))
        bends.sort()
        self._turns = [turn for turn, _, _ in bends]
        more, more_s = [one for _, one, _ in bends], [one for _, _, one in bends]
        self._slope = list(accumulate(more, initial=0.0))
        self._offset = list(accumulate(map(mul, more, self._turns), initial=0.0))
        self._slope_s = list(accumulate(more_s, initial=0.0))
        self._offset_s = list(accumulate(map(mul, more_s, self._turns), initial=0.0))

    def ahead(self, state: RequestState) -> tuple[float, float]:
        """How many of these go before ``state``, which is of this class, and what they take."""
        user, ledger = state.user, self._order.ledger
        own, weight = self._parts.get(user), ledger.weights.get(user, 1.0)
        count, own_s, left_s = 0, 0.0, 0.0
        if own is not None:
            place = bisect_left(self._keys, (self._order.rank(state), state.arrival), own.start, own.end)
            count, own_s, left_s = self._counts[place], self._sums[place], own.left_s(ledger.accounts.get(user))
        turn = ledger[user] + (max(0.0, own_s - left_s) + state.standalone_s) / weight
        place = bisect_left(self._turns, turn)
        requests = self._slope[place] * turn - self._offset[place]
        seconds = self._slope_s[place] * turn - self._offset_s[place]
        if own is not None and own.seconds > 0:  # That is known better.
            share = min(1.0, max(0.0, turn - own.had) * weight / own.seconds)
            requests, seconds = requests - share * (own.end - own.start), seconds - share * own.seconds
        return requests + count, seconds + own_s


class Survey:
    """Those that waited, by class and user.

    Args:
        waiting: All of them.
        order: Of those.
        now: The clock's reading.
        gain: Seconds of work that are done in a second.

    Attributes:
        least_s: What the shortest of them takes.
    """

    def __init__(self, waiting: Iterable[RequestState], order: Order, now: float, gain: float) -> None:
        self.least_s = math.inf
        self._now, self._gain, self._ledger = now, gain, order.ledger
        self._before, self._gone_s = order.ledger.gone, order.ledger.gone_s
        classes: defaultdict[int, list[RequestState]] = defaultdict(list)
        self._count = 0
        for state in waiting:
            self._count += 1
            self.least_s = min(self.least_s, state.standalone_s)
            classes[state.priority].append(state)
        self._classes = {number: Crowd(states, order, now, gain) for number, states in classes.items()}

    @property
    def _gone(self) -> int:
        """How many have left since."""
        return self._ledger.gone - self._before

    def changed(self, count: int) -> float:
        """How many have come and left, where so many wait by now. Infinite if others are meant."""
        came = count - self._count + self._gone
        return came + self._gone if came >= 0 else math.inf

    def holds(self, count: int, now: float, gain: float) -> bool:
        """Whether it may be asked still, for a request that gains so much by sharing."""
        alike = SHARE * self.changed(count) <= self._count and gain >= STEADY * self._gain
        return alike and now - self._now <= LASTS_S

    def ahead(self, state: RequestState) -> tuple[float, float]:
        """How many of these go before ``state``, which has come, at least, and what they would take one at a time.

        That is better classes; of its class those of its own user that the policy ranks before it and that are not late
        when their turn comes; and of every other user as much as it takes to have had as much. Whoever has left since
        would have gone before it, and whoever has come does not.
        """
        better = [crowd for number, crowd in self._classes.items() if number < state.priority]
        requests, seconds = sum(crowd.count for crowd in better), sum(crowd.seconds for crowd in better)
        crowd = self._classes.get(state.priority)
        alike, alike_s = (0.0, 0.0) if crowd is None else crowd.ahead(state)
        requests, seconds = requests + alike - self._gone, seconds + alike_s - (self._ledger.gone_s - self._gone_s)
        return max(0.0, requests), max(0.0, seconds)
