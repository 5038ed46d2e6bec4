"""Books: the live requests of one worker's scheduler, who of them waits and who is resident; their coming and going."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count

from steploom.config import EngineConfig
from steploom.errors import RequestError
from steploom.protocol import run_id
from steploom.requests import DiffusionRequest, Event, Failed, Queued
from steploom.sched.cost_model import CostModel
from steploom.sched.demand import Demands
from steploom.sched.intake import Intake
from steploom.sched.interface import SchedulerInterface
from steploom.sched.policy import Policy
from steploom.sched.quarantine import Door, Quarantine, Suspect
from steploom.sched.state import Clock, RequestState, guess_key


class Numbers:
    """Arrivals, from 0, and run ids, from 1, numbered through: by all schedulers that share waiting requests."""

    def __init__(self) -> None:
        self.arrivals = count()
        self.runs = count(1)


class Books(SchedulerInterface):
    """Who is alive, who waits, who is resident. :class:`~steploom.sched.BaseScheduler` decides on top of it.

    Attributes:
        worker: The rank of the worker for which it decides.
    """

    def __init__(self, config: EngineConfig, policy: Policy, clock: Clock) -> None:
        self.config = config
        self.policy = policy
        self.clock = clock
        self.worker = 0
        self.demands: Demands = getattr(policy, "demands", None) or Demands(CostModel())
        self.costs = self.demands.costs
        self._intake = Intake(config, self.demands, policy)
        self._numbers = Numbers()
        self._quarantine = Quarantine(config.max_retries)
        self._door = Door(policy, self._quarantine)
        self._alive: dict[str, RequestState] = {}
        self._resident: dict[str, RequestState] = {}
        self._forget: dict[str, None] = {}
        self._near: dict[str, RequestState] = {}  # Residents with one more step to do, as last reported.
        self._ending: dict[str, RequestState] = {}
        self._outside: dict[str, RequestState] = {}
        self._aside: dict[str, RequestState] = {}
        policy.ending, policy.aside = self._ending, self._aside  # They hold memory.

    @property
    def num_waiting(self) -> int:
        """Requests that were accepted and that no worker holds."""
        return len(self._alive) - len(self._resident)

    @property
    def num_running(self) -> int:
        """Requests that a worker holds."""
        return len(self._resident)

    @property
    def _held(self) -> int:
        """Places that are taken: residents but those that are ending or outside."""
        return len(self._resident) - len(self._ending) - len(self._outside)

    @property
    def room(self) -> tuple[int, int]:
        """How many places the worker has left, and how many of them a single batch has."""
        held = len(self._resident) - len(self._ending)
        return max(0, self.config.resident_limit - held), max(0, self.config.batch_limit - held)

    @property
    def load_s(self) -> float:
        """Seconds that is left of its requests, one at a time, as estimated."""
        demands = self.demands
        running = sum(demands.remaining_s(state, demands.step_s(state)) for state in self._resident.values())
        return running + self._intake.queued_s

    @property
    def tries(self) -> bool:
        """Whether it finds out who has killed workers: only those in question are let in meanwhile."""
        return self._quarantine.closed

    def find(self, request_id: str) -> RequestState | None:
        """The request, if it is alive, and here."""
        return self._alive.get(request_id)

    def add_request(self, request: DiffusionRequest) -> Queued:
        """Accepts a request into the waiting queue."""
        request_id, position = request.request_id, self.num_waiting
        self._intake.check(request, self._alive)
        guess, run = guess_key(request), self._new_run_id(request_id)
        state = RequestState(request, next(self._numbers.arrivals), self.clock(), guess, run)
        self._intake.admit(state, position)
        self._alive[request_id] = state
        self._intake.enters(state)
        self._door.enqueue(state)
        return Queued(request_id=request_id, position=position)

    def readmit(self, request: DiffusionRequest) -> Queued:
        """Accepts a request that another scheduler had accepted, however many wait."""
        with self._intake.unbounded():
            return self.add_request(request)

    def _new_run_id(self, request_id: str) -> str:
        """A run id that was never used before.

        Attempts are numbered through, not per request: a request id may be used again while an answer that concerns its
        previous owner is still under way.
        """
        return run_id(request_id, next(self._numbers.runs))

    def finish_requests(self, request_ids: Iterable[str], error: RequestError) -> list[Event]:
        """Ends requests from outside."""
        events: list[Event] = []
        for request_id in request_ids:
            state = self._alive.get(request_id)
            if state is not None:
                if state.resident:
                    self._forget[state.run_id] = None
                self._end(state)
                events.append(Failed(request_id=request_id, error=error))
        return events

    def share(self, worker: int, intake: Intake, numbers: Numbers) -> None:
        """From now on it is the scheduler of one of several workers.

        Args:
            worker: Its rank.
            intake: Takes note of who waits here.
            numbers: Those of all of them.
        """
        intake.inherit(self._intake)
        for state in self._alive.values():
            if not state.resident:
                intake.enters(state)
        self.worker, self._intake, self._numbers = worker, intake, numbers

    @property
    def numbers(self) -> Numbers:
        """What numbers its arrivals and run ids."""
        return self._numbers

    def release(self, state: RequestState) -> Suspect | None:
        """Gives up the waiting ``state``, and what is held against it, to be adopted elsewhere."""
        self._remove(state)
        return self._quarantine.hand_over(state.request_id)

    def adopt(self, state: RequestState, suspect: Suspect | None) -> None:
        """``state``, which another scheduler has released, waits here; one that is replayed before the others."""
        self._alive[state.request_id] = state
        self._quarantine.take_over(state.request_id, suspect)
        self._intake.enters(state)
        self._door.enqueue(state, front=state.attempt > 0)

    def confines(self, request_id: str) -> bool:
        """Whether the request is one of those that are tried here."""
        return self._quarantine.confines(request_id)

    def surrender(self) -> list[list[str]]:
        """Gives up trying requests; those that were to be tried together, to be confined elsewhere."""
        return self._quarantine.surrender()

    def confine(self, cells: list[list[str]]) -> None:
        """Has these tried here, once they are adopted."""
        self._quarantine.confine(cells)
        self._door.close(self._alive.values())

    def _end(self, state: RequestState) -> None:
        """It has its outcome."""
        self._remove(state)
        self._quarantine.leave(state.request_id)

    def _remove(self, state: RequestState) -> None:
        """Takes a live request out of all books."""
        del self._alive[state.request_id]
        if state.resident:
            del self._resident[state.run_id]
            self._near.pop(state.run_id, None)
            (self._unlist if state.retired else self.policy.retire)(state)
        else:
            self._intake.leaves(state, self.num_waiting)
            self._door.withdraw(state)

    def _unlist(self, state: RequestState) -> None:
        next(book for book in (self._ending, self._outside, self._aside) if state.run_id in book).pop(state.run_id)
