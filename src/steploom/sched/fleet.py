"""Fleet: one waiting queue for several workers, each of which has a scheduler and decides ticks of its own."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable

from steploom.config import EngineConfig
from steploom.errors import ConfigError, RequestError
from steploom.protocol import RunnerOutput, SchedulerOutput
from steploom.requests import DiffusionRequest, Event, Queued
from steploom.sched.base_scheduler import BaseScheduler
from steploom.sched.cost_model import CostModel
from steploom.sched.demand import Demands
from steploom.sched.interface import SchedulerInterface
from steploom.sched.share import Place, Share, Whole
from steploom.sched.state import RequestState


class Fleet:
    """The schedulers of several workers, as one scheduler.

    A request waits with the worker that has the least to do, by estimated seconds, and lives where it was admitted.
    But nobody owns who waits: before a worker decides a tick in which it can let somebody in, it takes over

    - whoever waits with a worker that cannot let anybody in, and goes before those that it would let in;
    - and if fewer wait with itself than it can let in, who waits with one that has more to do: so none idles.

    What a worker held that dies is replayed by the others. Who has to be tried apart, since it may have killed the
    worker, is tried by that worker when it was replaced; the others serve meanwhile.

    The bounds of the waiting queue are those of all workers together; what ticks cost is learned from all.

    Args:
        config: Settings of the engine.
        first: The scheduler of the first worker; it may have requests already.

    Attributes:
        members: By rank.

    Raises:
        ConfigError: The scheduler cannot share waiting requests.
    """

    def __init__(self, config: EngineConfig, first: SchedulerInterface) -> None:
        self.config = config
        scheduler = _shareable(first)
        self.demands: Demands = scheduler.demands
        self.costs: CostModel = scheduler.costs
        self.members: list[Member] = []
        self.whole = Whole(config, self.demands, self)
        self._numbers = scheduler.numbers
        self._join(scheduler)

    def add(self, scheduler: SchedulerInterface) -> Member:
        """One more worker.

        Args:
            scheduler: Its scheduler, with nobody in it.
        """
        one = _shareable(scheduler)
        one.demands = one.policy.demands = self.demands
        one.costs = one.policy.costs = self.costs
        return self._join(one)

    def _join(self, scheduler: BaseScheduler) -> Member:
        share = Share(self, self.whole, scheduler)
        scheduler.share(len(self.members), share, self._numbers)
        member = Member(self, scheduler, share)
        self.members.append(member)
        self.count()
        return member

    def count(self) -> None:
        """Who serves has changed."""
        self.whole.workers = max(1, sum(member.serves for member in self.members))

    def __contains__(self, request_id: object) -> bool:
        return self._find(str(request_id)) is not None

    def _find(self, request_id: str) -> RequestState | None:
        found = (member.scheduler.find(request_id) for member in self.members)
        return next((state for state in found if state is not None), None)

    def revalue(self, tick_s: float) -> None:
        """Estimates anew whom something new is known of, and gives those of them that wait new places."""
        states = self.whole.learned(self._find, tick_s)
        if states:
            for member in self.members:
                member.share.revalue(states)

    def wait_s(self, state: RequestState) -> float:
        """As :meth:`steploom.sched.Policy.wait_s`, where that is least."""
        return min(member.scheduler.policy.wait_s(state) for member in self._serving)

    def place_s(self) -> float:
        """As :meth:`steploom.sched.Policy.place_s`, where that is least."""
        return min(member.scheduler.policy.place_s() for member in self._serving)

    @property
    def _serving(self) -> list[Member]:
        """The workers that serve, or if none does, all."""
        return [member for member in self.members if member.serves] or self.members

    @property
    def num_waiting(self) -> int:
        """Requests that were accepted and that no worker holds."""
        return sum(len(member.share) for member in self.members)

    @property
    def num_running(self) -> int:
        """Requests that workers hold."""
        return sum(member.scheduler.num_running for member in self.members)

    def add_request(self, request: DiffusionRequest) -> Queued:
        """Accepts a request into the waiting queue; see :meth:`SchedulerInterface.add_request`."""
        position = self.num_waiting
        self._least_loaded().scheduler.add_request(request)
        return Queued(request_id=request.request_id, position=position)

    def readmit(self, request: DiffusionRequest) -> Queued:
        """Accepts a request that another scheduler had accepted; see :meth:`SchedulerInterface.readmit`."""
        with self.whole.unbounded():
            return self.add_request(request)

    def _least_loaded(self, but: Member | None = None) -> Member:
        """The worker that has the least to do, of those that serve, if any does. It tries nobody, if any does not."""
        members = [member for member in self.members if member is not but]
        for chosen in ([m for m in members if m.open], [m for m in members if m.serves], members):
            if chosen:
                return min(chosen, key=lambda member: (member.scheduler.load_s, len(member), member.scheduler.worker))
        raise AssertionError("a fleet has more workers than leave it")

    def finish_requests(self, request_ids: Iterable[str], error: RequestError) -> list[Event]:
        """Ends requests from outside; see :meth:`SchedulerInterface.finish_requests`."""
        return [
            event
            for request_id in request_ids
            for member in self.members
            for event in member.scheduler.finish_requests([request_id], error)
        ]

    def offers(self, member: Member) -> bool:
        """Whether the worker, with which nobody waits, would take over somebody from another one."""
        return self._surplus(member) is not None if member.open and not len(member.share) else False

    def level(self, to: Member) -> None:
        """Has a worker take over whom it can let in, and who should not wait elsewhere."""
        if not to.open or not any(len(member.share) for member in self.members if member is not to):
            return
        places, batch = to.scheduler.room
        if len(to.share):
            places = min(places, max(1, batch))  # One may be let in though the batch is full: another one is paused.
        self._relieve(to, places)
        while len(to.share) < places and (donor := self._surplus(to)) is not None:
            self._move(donor, to)

    def _relieve(self, to: Member, places: int) -> None:
        """Has a worker take over who cannot be let in elsewhere, and goes before who would have the place here."""
        stuck = [m for m in self.members if m is not to and not (m.open and m.scheduler.room[0])]
        own: list[Place] | None = None
        while fronts := [(found.place, member) for member in stuck if (found := member.share.first()) is not None]:
            own = to.share.best(places) if own is None else own
            place, source = min(fronts, key=lambda front: front[0])
            if not places or (len(own) == places and own[-1] < place):
                return
            insort(own, place)
            del own[places:]
            self._move(source, to)

    def _surplus(self, to: Member) -> Member | None:
        """The worker from which another one takes over; None if no one has too much."""
        if not to.scheduler.room[0]:
            return None
        enough = len(to) + 2
        donors = [m for m in self.members if m is not to and m.share.first() and (not m.open or len(m) >= enough)]
        return max(donors, key=lambda member: (not member.open, len(member)), default=None)

    def _move(self, source: Member, to: Member) -> None:
        found = source.share.first()
        assert found is not None
        transfer(source, to, found.state)

    def spread(self, source: Member) -> None:
        """Those that wait with a worker, and are not tried there, wait with others from now on."""
        states = source.share.movable()
        replayed = [state for state in states if state.attempt]
        for state in [*reversed(replayed), *(state for state in states if not state.attempt)]:
            transfer(source, self._least_loaded(but=source), state)

    def surrender(self, source: Member) -> None:
        """Nobody can be tried by a worker any more: others do it."""
        cells = source.scheduler.surrender()
        if cells:
            heir = self._least_loaded(but=source)
            heir.scheduler.confine(cells)
            tried = {request_id for cell in cells for request_id in cell}
            for state in [state for state in source.share.movable() if state.request_id in tried]:
                transfer(source, heir, state)
        self.spread(source)

    def dismiss(self) -> None:
        """The last worker is gone; nobody is left with it."""
        member = self.members.pop()
        assert not len(member), "somebody is left with the worker"
        self.count()


def transfer(source: Member, to: Member, state: RequestState) -> None:
    """The waiting ``state`` waits with another worker from now on."""
    to.scheduler.adopt(state, source.scheduler.release(state))


class Member:
    """The part of a fleet that decides the ticks of one worker.

    Attributes:
        scheduler: What decides them.
        share: Who waits with it.
        up: Whether the worker lives.
        leaving: Whether it lets nobody in any more.
    """

    def __init__(self, fleet: Fleet, scheduler: BaseScheduler, share: Share) -> None:
        self._fleet = fleet
        self.scheduler = scheduler
        self.share = share
        self.up = True
        self.leaving = False

    def __len__(self) -> int:
        """Requests that are with it."""
        return self.scheduler.num_running + len(self.share)

    @property
    def serves(self) -> bool:
        """Whether the worker lives, and takes requests."""
        return self.up and not self.leaving

    @property
    def open(self) -> bool:
        """Whether it lets in whoever comes: nobody is tried by it."""
        return self.serves and not self.scheduler.tries

    @property
    def runs_ahead(self) -> bool:
        """As :attr:`SchedulerInterface.runs_ahead`."""
        return self.scheduler.runs_ahead

    @property
    def has_work(self) -> bool:
        """As :attr:`SchedulerInterface.has_work`; also if it would take over somebody."""
        return self.scheduler.has_work or self._fleet.offers(self)

    def schedule(self) -> SchedulerOutput:
        """As :meth:`SchedulerInterface.schedule`."""
        self._fleet.level(self)
        return self.scheduler.schedule()

    def amend(self) -> SchedulerOutput | None:
        """As :meth:`SchedulerInterface.amend`."""
        self._fleet.level(self)
        return self.scheduler.amend()

    def update_from_output(self, output: SchedulerOutput, result: RunnerOutput) -> list[Event]:
        """As :meth:`SchedulerInterface.update_from_output`."""
        return self.scheduler.update_from_output(output, result)

    def die(self, why: str) -> list[Event]:
        """The worker is dead: others replay what it held, if any serves."""
        events = self.scheduler.restart(None, why)
        self.absent()
        self._gone()
        return events

    def absent(self) -> None:
        """The worker does not live, for now."""
        self.up = False
        self._fleet.count()

    def recall(self) -> list[Event]:
        """Takes back what the worker holds, though it lives, so that others replay it."""
        events = self.scheduler.recall()
        self._gone()
        return events

    def _gone(self) -> None:
        fleet = self._fleet
        if self.leaving:
            fleet.surrender(self)
        elif any(member.open for member in fleet.members):
            fleet.spread(self)

    def revive(self) -> None:
        """The worker was replaced."""
        self.up = True
        self._fleet.count()

    def leave(self) -> None:
        """From now on it lets nobody in; others have who waits with it, but whom it tries."""
        self.leaving = True
        self._fleet.count()
        self._fleet.spread(self)

    def stay(self) -> None:
        """It takes requests after all."""
        self.leaving = False
        self._fleet.count()

    def give_up(self) -> None:
        """The worker cannot be replaced, for now: what it was to try is tried by others."""
        if any(member.up for member in self._fleet.members):
            self._fleet.surrender(self)


def _shareable(scheduler: SchedulerInterface) -> BaseScheduler:
    if not isinstance(scheduler, BaseScheduler):
        raise ConfigError(
            f"scheduler={type(scheduler).__name__}: with several workers it must be a subclass of "
            "steploom.sched.BaseScheduler; give one, or data_parallel_size=1"
        )
    return scheduler
