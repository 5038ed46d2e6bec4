"""Watch: which residents of a group may be too late, without asking all of them in every tick."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

from steploom.sched.state import RequestState


class Judge(Protocol):
    """Says which residents are too late: a policy."""

    def lost(self, state: RequestState, now: float, group_s: float) -> bool:
        """As :meth:`steploom.sched.ranked.Ranked.lost`."""
        ...

    def lost_from(self, state: RequestState, group_s: float) -> float:
        """As :meth:`steploom.sched.ranked.Ranked.lost_from`."""
        ...


class Watch:
    """From when on each resident of a group may be too late; then it is to be found out whether it is.

    What was found holds as long as a tick takes no longer than it did, and as nothing else of the costs is known anew:
    meanwhile each step that a resident does leaves it more time, not less.
    """

    __slots__ = ("_first", "_seconds", "_since", "_unseen", "_version")

    def __init__(self) -> None:
        self._unseen: dict[str, RequestState] = {}  # They have come, or more is known of them, since somebody asked.
        self._since: dict[str, float] = {}
        self._first = math.inf
        self._seconds, self._version = 0.0, -1

    def look(self, state: RequestState) -> None:
        """``state`` is resident, or more is known of it: it is asked again."""
        self._unseen[state.run_id] = state

    def leave(self, run_id: str) -> None:
        """It is in the group no more."""
        self._unseen.pop(run_id, None)
        self._since.pop(run_id, None)

    def lost(
        self, policy: Judge, residents: Mapping[str, RequestState], now: float, seconds: float, version: int
    ) -> set[RequestState]:
        """Those that are too late.

        Args:
            policy: Says who is.
            residents: Of the group.
            now: The clock's reading.
            seconds: Of a tick of the group.
            version: Of the costs.
        """
        since = self._since
        if version != self._version or seconds > self._seconds:
            self._seconds, self._version, self._first = seconds, version, math.inf
            self._unseen.update(residents)
        if self._unseen:
            for run, state in self._unseen.items():
                found = since[run] = policy.lost_from(state, self._seconds)
                self._first = min(self._first, found)
            self._unseen.clear()
        if now < self._first:
            return set()
        self._first = min(since.values(), default=math.inf)
        suspects = {residents[run] for run, first in since.items() if first <= now}
        lost = {state for state in suspects if policy.lost(state, now, seconds)}
        for state in suspects - lost:
            self.look(state)
        return lost
