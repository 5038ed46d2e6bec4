"""Quarantine: of those that ran when workers died, which one is to blame; found by halves, and nobody else fails."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterable, Mapping

from steploom.errors import GenerationFailed
from steploom.sched.policy import Policy
from steploom.sched.state import RequestState


class Suspect:
    """What is held against a request.

    Attributes:
        deaths: Why each worker died that had it in a tick.
        losses: How often a worker that lives had lost it.
        past: Steps after which it is beyond the one at which a worker died last.
        acquitted: Whether it was beyond that once, and others were let in with it.
    """

    __slots__ = ("acquitted", "deaths", "losses", "past")

    def __init__(self) -> None:
        self.deaths: list[str] = []
        self.losses = 0
        self.past = 0
        self.acquitted = False


class Quarantine:
    """Who may run after workers have died.

    A request is a *suspect* if it was in a tick in flight when its worker died. Up to ``max_retries`` deaths it is
    replayed with everybody else. Then it is *spent*: it runs only in its *cell*, while nobody else is let in. The spent
    ones of a death are two cells, tried one after the other. A cell in which the worker dies is halved again; a spent
    request that was alone in the ticks in flight is to blame. A cell that is done, or beyond the steps at which the
    worker died, is *acquitted*: where no other cell waits, everybody else may join it.

    It comes to an end: after its deaths with all others a request can see as many more as it takes to halve a batch
    down to one. An acquitted one that is in a tick of a worker that dies once more is tried to its very end, so at most
    as many again.

    No time, no order of its own: the same deaths lead to the same cells.

    Args:
        max_retries: Deaths after which a request is still replayed with everybody else; 0: nobody is replayed.

    Attributes:
        trial: The members of the cell that is tried now, as far as they are not done.
    """

    def __init__(self, max_retries: int) -> None:
        self._max_retries = max_retries
        self._suspects: dict[str, Suspect] = {}
        self._cells: deque[list[str]] = deque()
        self.trial: dict[str, None] = {}

    @property
    def closed(self) -> bool:
        """Whether only members of one cell are let in."""
        return bool(self.trial or self._cells)

    def admits(self, request_id: str) -> bool:
        """Whether the request may join a tick."""
        return not self.closed or request_id in self.trial

    def died(self, flying: Mapping[str, int], lost: Collection[str], why: str, *, alone: bool) -> list[str]:
        """A worker has died.

        Args:
            flying: Requests in its ticks in flight, in order, and how many steps of each are surely beyond these.
            lost: All that it held.
            why: What it died of.
            alone: Whether the only one in its ticks in flight was surely alone there.

        Returns:
            Who is to blame, and fails.
        """
        if not self._max_retries:
            for request_id in lost:
                self._suspect(request_id).deaths.append(why)
            return list(lost)
        spent = [request_id for request_id in flying if self._strike(request_id, why)]
        for request_id, past in flying.items():
            self._suspects[request_id].past = max(self._suspects[request_id].past, past)
        if not self.trial.keys().isdisjoint(lost):
            self._add([request_id for request_id in self.trial if request_id not in flying])
            self.trial.clear()
        if alone:
            return spent
        half = (len(spent) + 1) // 2
        self._add(spent[half:])
        self._add(spent[:half])
        return []

    def _add(self, cell: list[str]) -> None:
        if cell:
            self._cells.appendleft(cell)

    def _suspect(self, request_id: str) -> Suspect:
        return self._suspects.setdefault(request_id, Suspect())

    def _strike(self, request_id: str, why: str) -> bool:
        """Notes a death; whether the request is spent."""
        suspect = self._suspect(request_id)
        suspect.deaths.append(why)
        return len(suspect.deaths) > self._max_retries

    def lost(self, request_id: str) -> bool:
        """A worker that lives does not hold the request any more; whether it was lost too often to be replayed."""
        suspect = self._suspect(request_id)
        suspect.losses += 1
        return suspect.losses > self._max_retries

    def advance(self, *, busy: bool) -> bool:
        """Goes on to the next cell if it is time.

        Args:
            busy: Whether a worker holds anybody.

        Returns:
            Whether others may be let in than before, perhaps.
        """
        if not self.closed:
            return True
        if self.trial or busy:
            return False
        self.trial = dict.fromkeys(self._cells.popleft())
        return True

    def judge(self, steps: Mapping[str, int]) -> None:
        """Acquits the cell on trial if it is beyond the step at which the worker died, and no other cell waits.

        Args:
            steps: What its members have done.
        """
        suspects = [self._suspects[request_id] for request_id in self.trial]
        beyond = all(
            steps[request_id] >= suspect.past and not suspect.acquitted
            for request_id, suspect in zip(self.trial, suspects, strict=True)
        )
        if beyond and not self._cells:
            self.trial.clear()
            for suspect in suspects:
                suspect.acquitted = True

    def confines(self, request_id: str) -> bool:
        """Whether the request is a member of a cell."""
        return request_id in self.trial or any(request_id in cell for cell in self._cells)

    def hand_over(self, request_id: str) -> Suspect | None:
        """The request goes on elsewhere: what is held against it."""
        suspect = self._suspects.get(request_id)
        self.leave(request_id)
        return suspect

    def take_over(self, request_id: str, suspect: Suspect | None) -> None:
        """The request comes from elsewhere, where that was held against it."""
        if suspect is not None:
            self._suspects[request_id] = suspect

    def surrender(self) -> list[list[str]]:
        """All cells, which are tried here no more; nobody of them may be resident."""
        cells = [cell for cell in (list(self.trial), *self._cells) if cell]
        self.trial.clear()
        self._cells.clear()
        return cells

    def confine(self, cells: Iterable[list[str]]) -> None:
        """Tries these, too, when its own are done. Their members are to be taken over before anything else happens."""
        self._cells.extend(cells)

    def verdict(self, request_id: str) -> GenerationFailed:
        """Why the request fails: names the deaths."""
        suspect = self._suspects[request_id]
        deaths = suspect.deaths + ["its worker lost it"] * suspect.losses
        times = Counter(deaths)
        told = "; ".join(f"{why} ({number} times)" if number > 1 else why for why, number in times.items())
        alone = ", at last with nobody else" if len(suspect.deaths) > 1 else ""
        tries = f"{len(deaths)} attempt{'s' if len(deaths) > 1 else ''}"
        return GenerationFailed(f"gave up after {tries}{alone} (max_retries={self._max_retries}): {told}")

    def leave(self, request_id: str) -> None:
        """The request is done, failed or ended from outside."""
        if self._suspects.pop(request_id, None) is None:
            return
        self.trial.pop(request_id, None)
        for cell in self._cells:
            if request_id in cell:
                cell.remove(request_id)
        self._cells = deque(cell for cell in self._cells if cell)


class Door:
    """What stands between those that wait and the policy, which knows only of those that a quarantine admits.

    Args:
        policy: Chooses among those that were let through.
        quarantine: Says who may.

    Attributes:
        held_back: Those that may not, by request id, and whether they go before the others.
    """

    def __init__(self, policy: Policy, quarantine: Quarantine) -> None:
        self._policy = policy
        self._quarantine = quarantine
        self.held_back: dict[str, tuple[RequestState, bool]] = {}

    def enqueue(self, state: RequestState, *, front: bool = False) -> None:
        """``state`` waits from now on; with ``front`` before the others."""
        if self._quarantine.admits(state.request_id):
            self._policy.enqueue(state, front=front)
        else:
            self.held_back[state.request_id] = (state, front)

    def withdraw(self, state: RequestState) -> None:
        """The waiting ``state`` is gone."""
        if self.held_back.pop(state.request_id, None) is None:
            self._policy.withdraw(state)

    def held(self, *, busy: bool) -> int:
        """How many cannot run, whatever the policy chooses, before something else ends.

        Args:
            busy: Whether a worker holds anybody.
        """
        if not self.held_back or not self._quarantine.closed:
            return 0
        return len(self.held_back) if busy or self._quarantine.trial else 0

    def close(self, states: Iterable[RequestState]) -> None:
        """Takes back from the policy those of ``states`` that wait and are not admitted any more."""
        if not self._quarantine.closed:
            return
        for state in states:
            request_id = state.request_id
            if not (state.resident or request_id in self.held_back or self._quarantine.admits(request_id)):
                self._policy.withdraw(state)
                self.held_back[request_id] = (state, state.attempt > 0)

    def open(self, *, busy: bool) -> None:
        """Lets those through that are admitted by now.

        Args:
            busy: Whether a worker holds anybody.
        """
        if not self.held_back or not self._quarantine.advance(busy=busy):
            return
        admitted = [entry for entry in self.held_back.values() if self._quarantine.admits(entry[0].request_id)]
        admitted.sort(key=lambda entry: entry[0].arrival)
        for state, _ in admitted:
            del self.held_back[state.request_id]
        for state in reversed([state for state, front in admitted if front]):
            self._policy.enqueue(state, front=True)
        for state in [state for state, front in admitted if not front]:
            self._policy.enqueue(state)
