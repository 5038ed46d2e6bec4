"""SchedulerInterface: what the engine needs of a scheduler."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

from steploom.config import EngineConfig
from steploom.errors import RequestError
from steploom.protocol import RunnerOutput, SchedulerOutput
from steploom.requests import DiffusionRequest, Event, Queued
from steploom.sched.policy import Policy
from steploom.sched.state import Clock


class SchedulerInterface(ABC):
    """The contract between engine and scheduler: synchronous, without input and output, without time of its own.

    The engine calls :meth:`schedule`, has the executor execute what it returned, and hands the answer to
    :meth:`update_from_output`; every other method may be called in between. Two ticks may be in flight:
    :meth:`schedule` may be called again before the previous tick was answered. Answers come in the order of the ticks.
    The engine does so only if :attr:`runs_ahead`; then it also calls :meth:`amend`.

    Each accepted request ends in exactly one ``Finished`` or ``Failed`` event.

    Args:
        config: Settings of the engine.
        policy: Order of the waiting requests and choice of the batch.
        clock: Seconds from a fixed origin.
    """

    @abstractmethod
    def __init__(self, config: EngineConfig, policy: Policy, clock: Clock) -> None: ...

    @abstractmethod
    def add_request(self, request: DiffusionRequest) -> Queued:
        """Accepts a request into the waiting queue.

        Raises:
            QueueFull: ``max_waiting`` requests wait already.
            InvalidRequest: A live request has the same id.
        """

    def readmit(self, request: DiffusionRequest) -> Queued:
        """Accepts a request that another scheduler had accepted: bounds of the queue are not held against it.

        Raises:
            InvalidRequest: A live request has the same id.
        """
        return self.add_request(request)

    @abstractmethod
    def schedule(self) -> SchedulerOutput:
        """Decides one tick: who joins, who steps, what the workers may forget. Numbers it."""

    @property
    def runs_ahead(self) -> bool:
        """Whether a tick can be decided before the one before it is answered, and amended. False unless you say so."""
        return False

    def amend(self) -> SchedulerOutput | None:
        """Adds to the tick that was decided last, which waits behind another one, what has changed since.

        Returns:
            The amendment, with the number of that tick: who joins it, who steps in the place of others, who is
            forgotten. None if there is nothing to add.
        """
        return None

    @abstractmethod
    def update_from_output(self, output: SchedulerOutput, result: RunnerOutput) -> list[Event]:
        """Takes a worker's answer to ``output``.

        Results of requests that are no longer alive, and of earlier attempts, are ignored. A live request of ``output``
        that the answer does not mention was lost by the worker, and is replayed. ``output`` is the tick as it was
        executed: with the amendments that were in time.

        Returns:
            Per report, in the reports' order: a ``StepEvent`` if it ended a step, then ``Finished`` or ``Failed`` if it
            was the last. Then ``Restarted`` or ``Failed`` of the requests that were lost.

        Raises:
            ProtocolError: ``result`` answers another tick.
        """

    @abstractmethod
    def finish_requests(self, request_ids: Iterable[str], error: RequestError) -> list[Event]:
        """Ends requests from outside: aborted, timed out, cancelled. Takes no longer the more requests wait.

        Returns:
            One ``Failed`` for each id that was alive; unknown ids are ignored.
        """

    @abstractmethod
    def restart(self, request_ids: Iterable[str] | None = None, why: str = "its worker died") -> list[Event]:
        """The workers that held these requests are gone: replays them, before all that wait.

        Args:
            request_ids: Those to replay; ids that no worker holds are ignored. None is everything that any worker
                holds, and the right thing to pass if there is one worker.
            why: What the workers died of, for whom it is held against.

        Returns:
            ``Restarted`` for each, or ``Failed`` for one that is to blame: it was replayed ``max_retries`` times
            already, and alone in the ticks in flight.
        """

    @property
    @abstractmethod
    def has_work(self) -> bool:
        """Whether :meth:`schedule` would emit something: a request to run, or an id that the workers may forget."""

    @property
    @abstractmethod
    def num_waiting(self) -> int:
        """Requests that were accepted and that no worker holds."""

    @property
    @abstractmethod
    def num_running(self) -> int:
        """Resident requests: those that a worker holds, or gets with the tick that was decided last.

        One whose last step is under way counts, although its place may have been given away already.
        """


def overrides_together(kind: type, method: str, *companions: str) -> bool:
    """Whether whoever defined ``method`` of ``kind`` knew of its companions: none was defined further up only.

    A class that overrides a method as it was before these existed keeps working, without what they are for.
    """
    order = kind.__mro__

    def place(name: str) -> int:
        return next(i for i, one in enumerate(order) if name in vars(one))

    return all(place(companion) <= place(method) for companion in companions)
