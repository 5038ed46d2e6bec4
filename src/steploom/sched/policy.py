"""Policy: the order of waiting requests and the choice of each tick's batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from steploom.config import EngineConfig
from steploom.sched.cost_model import CostModel
from steploom.sched.demand import Demands
from steploom.sched.lines import Rank
from steploom.sched.state import Clock, RequestState


class Batch(NamedTuple):
    """What a policy chose for one tick.

    Attributes:
        batch_key: The observed key that the members have in common; None if it is only guessed.
        cached: Run ids of the resident requests that step.
        joining: Waiting requests that become resident, in the order of admission.
    """

    batch_key: str | None
    cached: list[str]
    joining: list[RequestState]


class Policy(ABC):
    """Decides who runs next. The scheduler owns the requests' states; a policy owns their order.

    The scheduler reports every change of a request before it asks again, so that a policy can keep whatever index it
    needs and never has to look at all waiting requests in a tick. A request is either *waiting* (between
    :meth:`enqueue` and :meth:`withdraw`, or :meth:`choose`) or *resident* (from then to :meth:`retire`).

    Args:
        config: Settings of the engine.
        clock: Seconds from a fixed origin, for policies that look at deadlines.

    Attributes:
        costs: What ticks cost; the scheduler has it learn from the workers' answers.
        demands: What requests take, estimated from that. Where several workers learn together, this is replaced.
        ending: By run id the residents that were retired since their last step is under way.
        aside: Likewise those that were retired since they wait for what runs beside the ticks.
    """

    def __init__(self, config: EngineConfig, clock: Clock) -> None:
        self.config = config
        self.clock = clock
        self.demands = Demands(CostModel())
        self.costs = self.demands.costs
        self.ending: Mapping[str, RequestState] = {}
        self.aside: Mapping[str, RequestState] = {}

    @abstractmethod
    def enqueue(self, state: RequestState, *, front: bool = False) -> None:
        """``state`` waits from now on; with ``front`` before all others of its priority (it is replayed)."""

    @abstractmethod
    def withdraw(self, state: RequestState) -> None:
        """The waiting ``state`` is gone (aborted, timed out). Must not take longer the more requests wait."""

    @abstractmethod
    def retire(self, state: RequestState) -> None:
        """The resident ``state`` is gone (finished, failed, aborted, or its worker died), or about to be.

        Where ticks are decided ahead, a request is retired when its last step is under way. It is resident again if
        that was not its end: :meth:`stay`.
        """

    @abstractmethod
    def observe(self, state: RequestState) -> None:
        """``state.batch_key`` of a resident request is known now, or has changed."""

    def revalue(self, states: Sequence[RequestState]) -> None:
        """``standalone_s`` and ``deadline`` of these, which wait or run, have changed: more is known of them."""
        return

    def wait_s(self, state: RequestState) -> float:
        """Seconds that ``state``, which has just come and is not enqueued yet, waits for a place at least."""
        return self.place_s()

    def place_s(self) -> float:
        """Seconds until a resident is done, if all places are taken; else 0."""
        return 0.0

    @abstractmethod
    def choose(self, max_batch: int, free: int) -> Batch:
        """Chooses the members of the next tick; those that join are resident from now on.

        Args:
            max_batch: Members that the batch may have, at least 1.
            free: How many of them may join, since a worker has no place for more residents.

        Returns:
            At least one member if a request is resident that is not aside, or if one waits, ``free`` is not 0 and
            nobody is resident.
        """

    def rank(self, state: RequestState) -> Rank:
        """Where several workers share those that wait: the order of these within a class, the lowest first.

        It changes only when more is known of ``state`` (:meth:`revalue`). Among equals, as all are by default, who
        came first is first.
        """
        return ()

    # Of a policy without these two, no tick is decided ahead.

    def extend(self, members: Sequence[str], max_batch: int, free: int) -> Batch:
        """Chooses who else takes part in the tick that was chosen last, which has not begun.

        Args:
            members: Run ids of the residents that are in it, at least one; some may be retired, for it is their last.
            max_batch: Members that the batch may have, with these.
            free: How many may join, since a worker has no place for more residents.

        Returns:
            The members that are added.
        """
        raise NotImplementedError

    def stay(self, state: RequestState) -> None:
        """``state``, which was retired since its end was expected, is resident and may be chosen again."""
        raise NotImplementedError
