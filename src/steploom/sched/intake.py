"""Intake: who may wait. Bounds on requests and on seconds of work, and when to try again."""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Container, Generator
from typing import Protocol
from weakref import WeakSet, ref

from steploom.config import EngineConfig
from steploom.errors import DeadlineExceeded, InvalidRequest, QueueFull
from steploom.requests import DiffusionRequest
from steploom.sched.demand import Demands, Kind, kind_of
from steploom.sched.state import RequestState

MANY = 1024
"""Kinds of which little is known, before those are dropped of which nobody is alive."""

SOME = 64
"""Requests that are estimated anew after one tick: the others have their turn after the next ones."""

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
        self._unsure: dict[Kind, WeakSet[RequestState]] = {}  # Those of a kind of which little is known.
        self._stale: deque[ref[RequestState]] = deque()  # Of their kind more is known than when they were estimated.
        self._many = MANY

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
            self._doubt(state)

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

    def _doubt(self, state: RequestState) -> None:
        """``state`` is to be estimated anew once more is known."""
        unsure = self._unsure
        unsure.setdefault(kind_of(state), WeakSet()).add(state)
        if len(unsure) >= self._many:  # Of most of these nobody is alive any more.
            for kind in [kind for kind, states in unsure.items() if not states]:
                del unsure[kind]
            self._many = 2 * len(unsure) + MANY

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
        return self._demands.fresh or bool(self._stale)

    def learned(self, alive: Callable[[str], RequestState | None]) -> list[RequestState]:
        """Estimates some of those anew of whose kind something was measured for the first time, in order of arrival.

        When nothing at all was known before, these are all: what is not of a kind that was measured is estimated by
        the nearest one. A request is so estimated four times at most.

        Args:
            alive: The request of an id, if it waits or runs.

        Returns:
            These, ``SOME`` at most.
        """
        if self._demands.fresh:
            self._stale.extend(self._outdated())
        states: list[RequestState] = []
        while self._stale and len(states) < SOME:
            state = self._stale.popleft()()
            if state is not None and alive(state.request_id) is state:
                states.append(state)
        for state in states:
            before_s = state.standalone_s
            self._estimate(state)
            if not state.resident:
                self.queued_s += state.standalone_s - before_s
        return states

    def _outdated(self) -> list[ref[RequestState]]:
        """Those of whose kind more was measured since they were estimated, in order of arrival."""
        first, kinds = self._demands.news()
        unsure = self._unsure
        groups = list(unsure.values()) if first else [unsure[kind] for kind in kinds if kind in unsure]
        for kind in filter(self._demands.sure, kinds):
            unsure.pop(kind, None)
        return [ref(state) for state in sorted(itertools.chain(*groups), key=lambda state: state.arrival)]

    def inherit(self, other: Intake) -> None:
        """Takes the place of another one, of whose requests it knows as much from now on."""
        self._unsure.update(other._unsure)
        self._stale.extend(other._stale)

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
