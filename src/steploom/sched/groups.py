"""Groups: requests that may share a forward, resident or waiting; and which guess leads to which group."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from itertools import chain

from steploom.sched.hall import Hall
from steploom.sched.lines import Line, Order
from steploom.sched.state import RequestState
from steploom.sched.watch import Watch

MAX_LINKS = 4096
"""How many guesses an observed key is remembered for."""

PASSES = 256
"""A group that was passed over in so many ticks has the next one, whatever they cost."""


class Group:
    """The requests of a batch key.

    Attributes:
        key: The observed key, or a guess.
        batch_key: The observed key; None if it is only guessed.
        residents: Those that a worker holds, by run id, oldest first.
        paused: Of these, those that are left out of the group's ticks.
        line: Those that wait.
        seconds: Of a tick of its residents as they are, by the costs that were known as of ``version``.
        version: That of the costs; -1 if its residents have changed since (:meth:`touch`).
        order: Its residents in an order of the policy's, if it has asked since.
        since: When it had its last turn, or came into being.
        turn: The number of the policy's choice then.
        joined: Likewise when somebody was let in last.
        watch: Which of its residents may be too late.
    """

    __slots__ = (
        "_best", "batch_key", "joined", "key", "line", "order", "paused", "residents", "seconds", "since", "turn",
        "version", "watch",
    )  # fmt: skip

    def __init__(self, key: str, order: Order, now: float, turn: int) -> None:
        self.key = key
        self.batch_key = None if key.startswith("?") else key
        self.residents: dict[str, RequestState] = {}
        self.paused: dict[str, RequestState] = {}
        self.line = Line(order)
        self.since = now
        self.turn = self.joined = turn
        self.seconds = 0.0
        self.watch = Watch()
        self.touch()

    def touch(self) -> None:
        """Who is resident or paused has changed, or what is known of one: it is asked anew when it is needed."""
        self.version = -1
        self.order: list[RequestState] | None = None
        self._best: float | None = None

    @property
    def priority(self) -> float:
        """The best class of its residents and of those that wait: who waits for their places lends them its own."""
        best, waiting = self._best, self.line.priority
        if best is None:
            best = self._best = min((state.priority for state in self.residents.values()), default=math.inf)
        return best if best <= waiting else waiting

    @property
    def stepping(self) -> int:
        """Residents that are not paused."""
        return len(self.residents) - len(self.paused)

    @property
    def steps(self) -> list[RequestState]:
        """Residents that are not paused, the oldest first; all of them, if all are."""
        paused = self.paused
        return [state for run, state in self.residents.items() if run not in paused] or list(self.residents.values())


class Groups:
    """All groups by key: those with residents (``active``), and those in which all wait (``pending``, oldest first).

    A request belongs to the group of its observed key. Before there is one it belongs to the group that the last
    request of the same guess turned out to be in, or to a group of its own guess.

    ``_index`` orders the requests of pending groups by the policy's rank. Stale entries, whose request left or whose
    group has residents, are dropped when they come up, or when they are the majority.
    """

    def __init__(self, order: Order) -> None:
        self._order = order
        self.active: OrderedDict[str, Group] = OrderedDict()
        self.pending: OrderedDict[str, Group] = OrderedDict()
        self.home: dict[str, Group] = {}
        self.turns = 0
        self._links: OrderedDict[str, str] = OrderedDict()
        self.ledger = order.ledger
        self._hall = Hall(order, self._in_hall)

    def of(self, key: str, now: float) -> Group:
        """The group of a key, made if there is none."""
        group = self.active.get(key) or self.pending.get(key)
        if group is None:
            group = self.pending[key] = Group(key, self._order, now, self.turns)
        return group

    def overtaken(self, now: float) -> Group | None:
        """The pending group that has waited for too long for a place, if there is one."""
        oldest = next(iter(self.pending.values()), None)
        if oldest is None:
            return None
        late = now - oldest.since > self._order.ageing_s or self.turns - oldest.turn > PASSES
        return oldest if late else None

    def led(self, guess: str) -> Group | None:
        """The group that waiting requests of this guess are in, or would be, if there is one."""
        key = self._links.get(guess, guess)
        return self.active.get(key) or self.pending.get(key)

    def all(self) -> Iterator[Group]:
        """All groups."""
        return chain(self.active.values(), self.pending.values())

    def best(self) -> tuple[float, list[Group]]:
        """The best class of the groups with residents, and those that are of it."""
        best, found = math.inf, list[Group]()
        for group in self.active.values():
            priority = group.priority
            if priority < best:
                best, found = priority, [group]
            elif priority == best:
                found.append(group)
        return best, found

    @property
    def taken(self) -> int:
        """Residents of all groups."""
        return sum(len(group.residents) for group in self.active.values())

    @property
    def waiting(self) -> int:
        """Those that wait, of all groups."""
        return len(self.home) - self.taken

    def of_state(self, state: RequestState, now: float) -> Group:
        """The group that the resident ``state`` belongs to by what is known about it."""
        return self.of(state.batch_key or self._links.get(state.guess, state.guess), now)

    def push(self, state: RequestState, now: float, front: bool = False) -> None:
        """``state`` waits from now on."""
        self.ledger.came(state.user)
        self._put(state, now, front)

    def _put(self, state: RequestState, now: float, front: bool) -> None:
        group = self.of(self._links.get(state.guess, state.guess), now)
        group.line.push(state, front=front)
        self.home[state.run_id] = group
        if not group.residents:
            self._enter(group, state, now)

    def remove(self, state: RequestState, now: float) -> None:
        """``state`` waits no more."""
        group = self.home.pop(state.run_id)
        self.ledger.left(state.user, state.standalone_s)
        if not group.residents and len(group.line.waiting) == 1:
            group.line.abandon(state)
            del self.pending[group.key]
            return
        number = group.line.remove(state)
        if group.residents:
            return
        heir = group.line.heir(state, number, now)
        if heir is not None:
            self._enter(group, heir, now)

    def admit(self, group: Group, now: float) -> RequestState:
        """The next of those that wait in the group is resident from now on."""
        state = group.line.pop(now)
        state.charged_s = self.ledger.let_in(state.user, state.standalone_s, sure=state.sure)
        group.joined = self.turns
        self.settle(state, group)
        return state

    def revalue(self, state: RequestState, now: float) -> None:
        """More is known of ``state``: if it waits its rank has changed, if it is resident what is charged for it."""
        group = self.home[state.run_id]
        if state.run_id in group.residents:
            group.touch()
            group.watch.look(state)
            more_s = state.standalone_s - state.charged_s
            if more_s > 0:
                state.charged_s += more_s
                self.ledger.charge(state.user, more_s)
            return
        group.line.revalue(state)
        if not group.residents:
            self._enter(group, state, now)

    def forget(self) -> None:
        """What users were charged was wrong."""
        self.ledger.forget()
        self._hall.reorder()
        for group in self.all():
            group.line.reorder()

    def settle(self, state: RequestState, group: Group) -> None:
        """The resident ``state`` belongs to ``group``, before those that came later than it."""
        residents = group.residents
        if not residents and self.pending.pop(group.key, None) is not None:
            self.active[group.key] = group
        if residents and next(reversed(residents.values())).arrival > state.arrival:
            self._insert(state, residents)
        else:
            residents[state.run_id] = state
        self.home[state.run_id] = group
        group.watch.look(state)
        group.touch()

    def _insert(self, state: RequestState, residents: dict[str, RequestState]) -> None:
        later = [(run, other) for run, other in residents.items() if other.arrival > state.arrival]
        for run, _ in later:
            del residents[run]
        residents[state.run_id] = state
        residents.update(later)

    def release(self, state: RequestState, now: float) -> None:
        """The resident ``state`` is gone."""
        group = self.home.pop(state.run_id)
        del group.residents[state.run_id]
        group.paused.pop(state.run_id, None)
        group.watch.leave(state.run_id)
        group.touch()
        if not group.residents:
            self._emptied(group, now)

    def observed(self, state: RequestState, now: float) -> None:
        """The key of a resident is known, or has changed: it moves there, and those of its guess follow."""
        assert state.batch_key is not None
        old = self.home[state.run_id]
        group = old if old.key == state.batch_key else self.of(state.batch_key, now)
        if old is not group:
            self._move(state, old, group, now)
        group.touch()  # its rows are known
        group.watch.look(state)
        linked = self._links.get(state.guess)
        # A link holds while its group lives, or a guess that covers several keys were moved about by every report.
        if linked != group.key and linked not in self.active:
            self._link(state.guess, group, now)

    def _move(self, state: RequestState, old: Group, group: Group, now: float) -> None:
        del old.residents[state.run_id]
        paused = old.paused.pop(state.run_id, None)
        old.watch.leave(state.run_id)
        old.touch()
        self.settle(state, group)
        if paused is not None:
            group.paused[state.run_id] = state
            group.touch()
        if not old.residents:
            self._emptied(old, now)

    def _link(self, guess: str, group: Group, now: float) -> None:
        """Requests of this guess belong to ``group`` from now on."""
        key = self._links.pop(guess, guess)
        old = self.active.get(key) or self.pending.get(key)
        self._links[guess] = group.key
        if len(self._links) > MAX_LINKS:
            self._links.popitem(last=False)
        if old is None or old is group:
            return
        for state in [s for s in old.residents.values() if s.batch_key is None and s.guess == guess]:
            self._move(state, old, group, now)
        self.pending.pop(old.key, None)
        if old.key == guess and group.residents and not len(group.line):  # all of them follow, in their order
            group.line, old.line = old.line, group.line
            self.home.update((state.run_id, group) for state in group.line.states())
            return
        for state in old.line.drain():
            self._put(state, now, front=bool(state.attempt))

    def first(self, now: float) -> Group | None:
        """The pending group that is to be let in next, if there is one: by class, by user, and by rank."""
        if not self.pending:
            self._hall.clear()
            return None
        run = self._hall.first(now)
        return None if run is None else self.home[run]

    def in_turn(self, oldest: Group, now: float) -> Group:
        """The oldest pending group, which has waited for long; or one of a user that has had less than its user.

        Else whoever floods the queue with shapes would have all places as soon as these have waited for long.
        """
        run = self._hall.first(now)
        found = None if run is None else self._in_hall(run)
        if run is None or found is None:
            return oldest
        had = self.ledger[found[0].user]
        return self.home[run] if had < self.had(oldest, now) else oldest

    def had(self, group: Group, now: float) -> float:
        """Seconds that the user was let in for whose request is next in the group."""
        return self.ledger[group.line.first(now).user]

    def _in_hall(self, run_id: str) -> tuple[RequestState, int] | None:
        """The request and its class, if it waits in a pending group."""
        group = self.home.get(run_id)
        return None if group is None or group.residents else group.line.find(run_id)

    def _enter(self, group: Group, state: RequestState, now: float) -> None:
        """Notes that ``state`` waits in a pending group."""
        found = group.line.find(state.run_id)
        self._hall.enter(state, state.priority if found is None else found[1], now)
        self._hall.tidy(len(self.home))

    def _emptied(self, group: Group, now: float) -> None:
        """A group without residents is pending, or forgotten."""
        self.active.pop(group.key, None)
        if len(group.line):
            group.since, group.turn = now, self.turns
            self.pending[group.key] = group
            for state in group.line.fronts(now):
                self._enter(group, state, now)
