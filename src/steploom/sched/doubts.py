"""Doubts: requests that were estimated while little was known of their kind, and whose turn it is to be so anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from weakref import ref

from steploom.sched.demand import Kind
from steploom.sched.state import RequestState

SLACK = 64
"""Entries of requests that are gone or sure that a row may have, whatever its size."""

LOOKS = 4
"""Entries that are looked at for each request that is estimated anew: most may be of requests that are gone."""


class Row:
    """Unsure requests in order of arrival, gone over from the first to the last, and round again if there is cause.

    Attributes:
        left: How many entries are still to be gone over.
    """

    __slots__ = ("_next", "_room", "_states", "left")

    def __init__(self) -> None:
        self._states: list[ref[RequestState]] = []
        self._next, self._room, self.left = 0, SLACK, 0

    def __iter__(self) -> Iterator[RequestState]:
        states = (one() for one in self._states)
        return (state for state in states if state is not None and not state.sure)

    def add(self, state: RequestState) -> None:
        """``state`` has come."""
        self._states.append(ref(state))
        if len(self._states) > self._room:
            self._tidy()

    def _tidy(self) -> None:
        """Drops those that are gone or sure, now that such may be the majority."""
        before = sum(_unsure(one) for one in self._states[: self._next])
        self._states = [one for one in self._states if _unsure(one)]
        self._next, self.left = before, min(self.left, len(self._states))
        self._room = 2 * len(self._states) + SLACK

    def again(self) -> None:
        """All are to be gone over, or what was begun is to be gone on with until all were."""
        if not self.left:
            self._next = 0
        self.left = len(self._states)

    def step(self) -> RequestState | None:
        """The next one, if it is there still, and unsure."""
        if self._next >= len(self._states):
            self._next = 0
        state = self._states[self._next]()
        self._next, self.left = self._next + 1, self.left - 1
        return None if state is None or state.sure else state


def _unsure(one: ref[RequestState]) -> bool:
    state = one()
    return state is not None and not state.sure


class Doubts:
    """Requests that were estimated while little was known of their kind."""

    def __init__(self) -> None:
        self._all = Row()
        self._kinds: dict[Kind, Row] = {}
        self._due: dict[int, Row] = {}  # By identity, in the order in which they are gone over.
        self._room = 1024

    def __bool__(self) -> bool:
        """Whether :meth:`take` has somebody to look at."""
        return bool(self._due)

    def __iter__(self) -> Iterator[RequestState]:
        return iter(self._all)

    def __len__(self) -> int:
        """Kinds, also those of which nobody is alive."""
        return len(self._kinds)

    def add(self, state: RequestState, kind: Kind) -> None:
        """``state`` has come, and little is known of its kind."""
        self._all.add(state)
        row = self._kinds.get(kind)
        if row is None:
            row = self._kinds[kind] = Row()
        row.add(state)
        if len(self._kinds) > self._room:  # Of most of these nobody is alive any more.
            self._kinds = {kind: row for kind, row in self._kinds.items() if any(True for _ in row)}
            self._room = 2 * len(self._kinds) + 1024

    def again(self, kinds: Iterable[Kind], *, everybody: bool) -> None:
        """Those of these kinds are to be estimated anew, or ``everybody`` is."""
        rows = [self._all] if everybody else [self._kinds[kind] for kind in kinds if kind in self._kinds]
        for row in rows:
            row.again()
            if row.left:
                self._due[id(row)] = row

    def drop(self, kind: Kind) -> None:
        """So much is known of the kind by now that this is the last time."""
        self._kinds.pop(kind, None)

    def take(self, most: int, alive: Callable[[str], RequestState | None]) -> list[RequestState]:
        """The next ones that are to be estimated anew and are alive, so many at most."""
        found: dict[RequestState, None] = {}
        looks = LOOKS * most
        while self._due and len(found) < most and looks:
            looks -= 1
            key, row = next(iter(self._due.items()))
            state = row.step()
            if not row.left:
                del self._due[key]
            if state is not None and alive(state.request_id) is state:
                found[state] = None
        return list(found)
