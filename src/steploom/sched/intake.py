"""Intake: who may wait. Bounds on requests and on seconds of work, and when to try again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Generator
from typing import Protocol

from steploom.config import EngineConfig
from steploom.errors import DeadlineExceeded, InvalidRequest, QueueFull
from steploom.requests import DiffusionRequest
from steploom.sched.demand import Demands, kind_of
from steploom.sched.doubts import Doubts
from steploom.sched.state import RequestState

SOME = 64
"""Requests that are estimated anew after one tick at most: the others have their turn after later ones."""

EACH_S = 400
"""Likewise for each second of ticks: so it takes the same small share of the time whatever a tick takes."""

DUE = 5.0
"""A request without a deadline is due after so many times the seconds that it takes by itself."""


class Waits(Protocol):
    """Says how long requests wait: a policy, or all of a fleet."""

    def wait_s(self, state: RequestState) -> float:
        """As :meth:`steploom.sched.Policy.wait_s`."""
        ...

    def place_s(self) -> float:
        """As :meth:`steploom.sched.Policy.place_s`."""
        ...


class Intake:
    """The bounds of the waiting queue.

    Args:
        config: Settings of the engine.
        demands: Estimates of requests.
        policy: Says how long a request waits at least.

    Attributes:
        queued_s: Seconds that those that wait would take one at a time.
    """

    def __init__(self, config: EngineConfig, demands: Demands, policy: Waits) -> None:
        self._config = config
        self._demands = demands
        self._policy = policy
        self.queued_s = 0.0
        self._bounded = True
        self._doubts = Doubts()
        self._credit = float(SOME)  # How many may be estimated anew by now.

    def check(self, request: DiffusionRequest, alive: Container[str]) -> None:
        """Raises:
        InvalidRequest: One of those ``alive`` has the request's id, or it has no order among others.
        """
        if request.request_id in alive:
            raise InvalidRequest(
                f"request_id={request.request_id!r}: a live request has this id; choose another or leave it out",
                field="request_id",
            )
        if type(request.priority) is not int:
            raise InvalidRequest(
                f"priority={request.priority!r}: must be an integer; lower runs first", field="priority"
            )

    def admit(self, state: RequestState, waiting: int) -> None:
        """Estimates the request, and lets it wait behind so many others.

        Raises:
            QueueFull: Too many wait, or too much work does; or it cannot be done within its timeout, where such are
                refused.
            DeadlineExceeded: It could not be done within its timeout even by itself, where such are refused.
        """
        self._estimate(state)
        if self._bounded:
            self._check_bounds(state, waiting)
        if not state.sure:
            self._doubts.add(state, kind_of(state))

    @contextlib.contextmanager
    def unbounded(self) -> Generator[None]:
        """Whoever comes meanwhile was accepted already: no bound holds against it."""
        self._bounded = False
        try:
            yield
        finally:
            self._bounded = True

    def _check_bounds(self, state: RequestState, waiting: int) -> None:
        request, gain = state.request, self._gain_of(state)
        if waiting >= self._config.max_waiting:
            usual = self.queued_s / max(1, waiting) / gain
            raise QueueFull(
                f"max_waiting={self._config.max_waiting}: as many requests wait already; try again later",
                retry_after_s=self._after(max(usual, self._policy.place_s())),
            )
        most, queued = self._config.max_waiting_s, self.queued_s
        if most is not None and waiting and (queued + state.standalone_s) / gain > most:
            raise QueueFull(
                f"max_waiting_s={most:g}: what waits takes about {queued / gain:.3g} s already; try again later",
                retry_after_s=self._after((queued + state.standalone_s) / gain - most),
            )
        if self._config.refuse_hopeless and request.timeout is not None and self._demands.knows:
            self._check_timeout(state, request.timeout)

    def _gain_of(self, state: RequestState) -> float:
        """As :attr:`gain`, or what sharing gains where so many wait as there are now, if that is more."""
        best = self._demands.gain(state, self._config.batch_limit)
        return self.gain * max(1.0, best / max(self._demands.costs.gain, 1e-3))

    def _estimate(self, state: RequestState) -> None:
        """What it takes by itself, and when it is due."""
        request = state.request
        state.standalone_s, state.sure = self._demands.standalone_s(state), self._demands.sure(kind_of(state))
        due = DUE * state.standalone_s if request.deadline is None else request.deadline
        state.deadline = state.submitted + (due if request.timeout is None else min(due, request.timeout))

    @property
    def stale(self) -> bool:
        """Whether :meth:`learned` has somebody to estimate anew."""
        return self._demands.fresh or bool(self._doubts)

    def learned(self, alive: Callable[[str], RequestState | None], tick_s: float) -> list[RequestState]:
        """Estimates some of those anew of whose kind something was measured for the first time, in order of arrival.

        When nothing at all was known before, these are all: what is not of a kind that was measured is estimated by
        the nearest one; they are gone over until enough was measured of one kind.

        Args:
            alive: The request of an id, if it waits or runs.
            tick_s: Seconds of the tick after which this is.

        Returns:
            These, ``SOME`` at most.
        """
        if self._demands.fresh:
            everybody, kinds = self._demands.news()
            self._doubts.again(kinds, everybody=everybody)
            for kind in filter(self._demands.sure, kinds):
                self._doubts.drop(kind)
        self._credit = min(SOME, self._credit + max(1.0, EACH_S * tick_s))
        if self._credit < SOME:
            return []
        if states := self._doubts.take(SOME, alive):
            self._credit = 0.0
        for state in states:
            before_s = state.standalone_s
            self._estimate(state)
            if not state.resident:
                self.queued_s += state.standalone_s - before_s
        return states

    def inherit(self, other: Intake) -> None:
        """Takes the place of another one, of whose requests it knows as much from now on."""
        for state in other._doubts:
            self._doubts.add(state, kind_of(state))
        self._doubts.again((), everybody=bool(other._doubts))

    @property
    def gain(self) -> float:
        """Standalone seconds of work that are done in a second."""
        return max(self._demands.costs.gain, 1e-3)

    def _check_timeout(self, state: RequestState, timeout: float) -> None:
        alone_s = state.standalone_s
        if alone_s > timeout:
            raise DeadlineExceeded(
                f"timeout={timeout:g}: the request takes about {alone_s:.3g} s even by itself; "
                "allow more, or ask for fewer steps or a smaller size"
            )
        wait_s = self._policy.wait_s(state)
        if wait_s + alone_s > timeout:
            raise QueueFull(
                f"timeout={timeout:g}: the request would wait for about {wait_s:.3g} s, and takes {alone_s:.3g} s "
                "more; try again later, or allow more",
                retry_after_s=self._after(wait_s + alone_s - timeout),
            )

    def _after(self, seconds: float) -> float | None:
        """When to come again; None while nobody can say."""
        return max(0.1, seconds) if self._demands.knows else None

    def enters(self, state: RequestState) -> None:
        """``state`` waits from now on."""
        self.queued_s += state.standalone_s

    def leaves(self, state: RequestState, waiting: int) -> None:
        """``state`` waits no more; so many others do."""
        self.queued_s = self.queued_s - state.standalone_s if waiting else 0.0
