"""Intake: who may wait. Bounds on requests and on seconds of work, and when to try again."""

from __future__ import annotations

from collections.abc import Container

from steploom.config import EngineConfig
from steploom.errors import DeadlineExceeded, InvalidRequest, QueueFull
from steploom.requests import DiffusionRequest
from steploom.sched.demand import Demands
from steploom.sched.state import RequestState

DUE = 5.0
"""A request without a deadline is due after so many times the seconds that it takes by itself."""


class Intake:
    """The bounds of the waiting queue.

    Args:
        config: Settings of the engine.
        demands: Estimates of requests.

    Attributes:
        queued_s: Seconds that those that wait would take one at a time.
    """

    def __init__(self, config: EngineConfig, demands: Demands) -> None:
        self._config = config
        self._demands = demands
        self.queued_s = 0.0

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
        request, demands = state.request, self._demands
        state.standalone_s = demands.standalone_s(state)
        if waiting >= self._config.max_waiting:
            raise QueueFull(
                f"max_waiting={self._config.max_waiting}: as many requests wait already; try again later",
                retry_after_s=self._until(self.queued_s / max(1, waiting)),
            )
        most, queued = self._config.max_waiting_s, self.queued_s
        if most is not None and waiting and queued / self.gain + state.standalone_s / self.gain > most:
            raise QueueFull(
                f"max_waiting_s={most:g}: what waits takes about {queued / self.gain:.3g} s already; try again later",
                retry_after_s=self._until(queued + state.standalone_s - most * self.gain),
            )
        if self._config.refuse_hopeless and request.timeout is not None:
            self._check_timeout(request.timeout, state.standalone_s)
        due = DUE * state.standalone_s if request.deadline is None else request.deadline
        state.deadline = state.submitted + (due if request.timeout is None else min(due, request.timeout))

    @property
    def gain(self) -> float:
        """Standalone seconds of work that are done in a second."""
        return max(self._demands.costs.gain, 1e-3)

    def _check_timeout(self, timeout: float, alone_s: float) -> None:
        if not self._demands.knows:
            return
        if alone_s > timeout:
            raise DeadlineExceeded(
                f"timeout={timeout:g}: the request takes about {alone_s:.3g} s even by itself; "
                "allow more, or ask for fewer steps or a smaller size"
            )
        queued_s = self.queued_s / self.gain
        if queued_s + alone_s > timeout:
            raise QueueFull(
                f"timeout={timeout:g}: what waits takes about {queued_s:.3g} s, and the request {alone_s:.3g} s more; "
                "try again later, or allow more",
                retry_after_s=self._until((queued_s + alone_s - timeout) * self.gain),
            )

    def _until(self, standalone_s: float) -> float | None:
        """Seconds until so much of the work is done; None while nobody can say."""
        return max(0.1, standalone_s / self.gain) if self._demands.knows else None

    def enters(self, state: RequestState) -> None:
        """``state`` waits from now on."""
        self.queued_s += state.standalone_s

    def leaves(self, state: RequestState, waiting: int) -> None:
        """``state`` waits no more; so many others do."""
        self.queued_s = self.queued_s - state.standalone_s if waiting else 0.0
