"""BaseScheduler: states, ids, attempts, capacity, clean-up. Order and batch choice are the policy's."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter, deque
from collections.abc import Collection, Iterable

from steploom.config import EngineConfig
from steploom.errors import ProtocolError
from steploom.protocol import NewRequest, RequestReport, RunnerOutput, SchedulerOutput
from steploom.requests import Event, Failed, Restarted, StepEvent
from steploom.sched.books import Books
from steploom.sched.interface import overrides_together
from steploom.sched.outcome import outcome
from steploom.sched.policy import Batch, Policy
from steploom.sched.state import Clock, RequestState
from steploom.sched.texts import texts


class BaseScheduler(Books):
    """Everything but the capacity, which a subclass gives by :meth:`_choose`, and by :meth:`_extend` to run ahead.

    A request is *waiting* (in ``_alive`` only), *resident* (in ``_alive`` and ``_resident``) or gone. What the workers
    must be told to forget is in ``_forget``: the run ids of residents that ended on our side. A worker drops by itself
    what it reported as finished, and never heard of what ended while it waited, so it is told of neither.

    A resident whose last step is in a tick that is under way is *ending*: the next tick is decided as if it were gone,
    and its place is given away. If it turns out to go on, it is back in the tick after that. Then there may be one more
    than the worker has places for. Whom it keeps out for that is *outside* until a place is free, before any newcomer:
    were it planned for meanwhile, it could be chosen for ever instead of the one that holds the place.

    A resident that waits for what runs beside the ticks is *aside*: it takes no place in a batch, and is in every tick.
    So the policy knows each resident but those ending, which are in a tick in flight, and those outside or aside.
    """

    def __init__(self, config: EngineConfig, policy: Policy, clock: Clock) -> None:
        super().__init__(config, policy, clock)
        self._tick = 0
        self._flights: deque[SchedulerOutput] = deque()
        self._ahead = self.runs_ahead
        self._can_stay = type(policy).stay is not Policy.stay  # Else it counts those aside, as it cannot be told.

    @abstractmethod
    def _choose(self) -> Batch:
        """Asks the policy for the members of a tick, within this scheduler's capacity: ``_held`` places are taken."""

    def _extend(self, members: list[str]) -> Batch:
        """Asks the policy who else takes part in the tick that was chosen last, with these residents."""
        raise NotImplementedError

    def _allowed(self, batch: Batch, members: int, free: int) -> Batch:
        """``batch``, if it has no more members than there is room for, and no more join than there are places.

        Raises:
            ValueError: The policy has not kept to what it was told.
        """
        cached, joining = len(batch.cached), len(batch.joining)
        if (cached + joining > members and cached + joining) or (joining > free and joining):
            raise ValueError(
                f"policy {type(self.policy).__name__} chose more than it may: {cached} residents and {joining} that "
                f"join, where there was room for {max(0, members)} in the batch and for {max(0, free)} to join"
            )
        return batch

    @property
    def runs_ahead(self) -> bool:
        """Whether scheduler and policy are both made for it."""
        return overrides_together(type(self), "_choose", "_extend") and overrides_together(
            type(self.policy), "choose", "extend", "stay"
        )

    @property
    def has_work(self) -> bool:
        """Whether :meth:`schedule` would emit something."""
        return len(self._alive) > len(self._ending) + self._door.held(busy=bool(self._resident)) or bool(self._forget)

    def schedule(self) -> SchedulerOutput:
        """Decides one tick."""
        self._tick += 1
        if self._outside or self._door.held_back or self._quarantine.trial:
            self._let_in()
        output = self._decided(self._tick, self._choose())
        output.scheduled_cached_reqs.extend(self._aside)
        self._flights.append(output)
        if self._near:
            self._expect_ends()
        return output

    def amend(self) -> SchedulerOutput | None:
        """Adds to the tick that was decided last, which waits behind another one, what has changed since."""
        if not self._flights:
            return None
        output, resident, aside = self._flights[-1], self._resident, self._aside
        members = [run for run in output.run_ids if run in resident and run not in aside]
        self._let_in()
        batch = self._extend(members) if members else self._choose()  # If all are gone, it may be another group's.
        if not (batch.cached or batch.joining or self._forget):
            return None
        amendment = self._decided(output.tick, batch)
        self._flights[-1] = output.amended(amendment)
        if self._near:
            self._expect_ends()
        return amendment

    def _let_in(self) -> None:
        """Plans for those again whom the worker has kept out, as far as it has places, and for those held back."""
        while self._outside and self._held < self.config.resident_limit:
            self._stays(next(iter(self._outside.values())))
        if self._quarantine.trial:
            self._quarantine.judge({request_id: self._alive[request_id].steps for request_id in self._quarantine.trial})
        self._door.open(busy=bool(self._resident))

    def _expect_ends(self) -> None:
        """Plans for those no more whose last step is under way, and again for those whose last step is not after all.

        These were added to a tick that the worker had begun, so it has landed without them.
        """
        if not self._ahead:
            self._near.clear()
            return
        flying = {run for output in self._flights for run in output.run_ids}
        for run in [run for run in self._near if run in flying]:
            self._retire(self._near.pop(run), self._ending)
        for state in [state for run, state in self._ending.items() if run not in flying]:
            self._stays(state)

    def _decided(self, tick: int, batch: Batch) -> SchedulerOutput:
        """A tick, or an amendment of one, with these members."""
        batch_key, cached, joining = batch
        new = self._admit(joining) if joining else []
        # The slot of an aborted resident may be given away in the tick that tells the worker to forget it: a worker
        # unwinds before it starts anything, so it never holds more than the limit.
        forget = list(self._forget)
        self._forget.clear()
        return SchedulerOutput(tick, new, cached, forget, batch_key, self.worker)

    def _admit(self, joining: list[RequestState]) -> list[NewRequest]:
        """Makes waiting requests resident."""
        now, resident = self.clock(), self._resident
        new: list[NewRequest] = []
        for state in joining:
            state.resident = True
            resident[state.run_id] = state
            self._intake.leaves(state, len(self._alive) - len(resident))
            if state.queued_s is None:
                state.queued_s = now - state.submitted
            new.append(NewRequest(state.run_id, state.request))
            if state.request.params.get("num_inference_steps") == 1:
                self._near[state.run_id] = state
        return new

    def update_from_output(self, output: SchedulerOutput, result: RunnerOutput) -> list[Event]:
        """Takes a worker's answer to ``output``.

        This has the hot loop of the host: what happens in every step of every request is inlined.
        """
        self._landed(output, result)
        events: list[Event] = []
        resident, near, rows = self._resident, self._near, 0
        for report in result.reports:
            state = resident.get(report.run_id)
            if state is None:
                if report.finished:
                    self._forget.pop(report.run_id, None)  # Ended on both sides at once: nothing left to forget.
                continue
            if state.retired or report.aside or not report.stage or report.batch_key != state.batch_key:
                self._observe(state, report)
            state.denoise_s += report.denoise_s
            if report.batch_requests:
                state.calls += 1
                state.mates += report.batch_requests
                rows += report.rows
            if report.stepped:
                state.steps += 1
                # fmt: off
                events.append(StepEvent(
                    request_id=state.request_id, stage=report.stage, step=report.step, total_steps=report.total_steps,
                    sigma=report.sigma, batch_requests=report.batch_requests, skipped_steps=report.skipped_steps,
                    latents=report.latents, preview=report.preview,
                ))
                # fmt: on
            if report.commit is not None or report.draft is not None:
                events += texts(state.request_id, report)
            state.encode_s += report.encode_s
            state.decode_s += report.decode_s
            if report.finished:
                events.append(self._conclude(state, report))
            elif report.total_steps == report.step + 1 and not report.aside:
                near[report.run_id] = state
        if near or self._ending:
            self._expect_ends()
        self.costs.observe(output.batch_key, result, rows)
        if self._intake.stale:
            self.policy.revalue(self._intake.learned(self._alive.get, result.seconds))
        lost = len(result.reports) < len(output.scheduled_cached_reqs) + len(output.scheduled_new_reqs)
        return events + self._replay_lost(output, result) if lost else events

    def _landed(self, output: SchedulerOutput, result: RunnerOutput) -> None:
        """The tick is in flight no more, nor is one before it."""
        if result.tick != output.tick:
            raise ProtocolError(f"tick={result.tick}: answers another tick than {output.tick}")
        flights = self._flights
        while flights and flights[0].tick <= output.tick:
            flights.popleft()
        if flights and flights[0].scheduled_new_reqs:
            self._begins(flights[0])

    def _begins(self, output: SchedulerOutput) -> None:
        """The worker turns to a tick that was sent ahead: until now those that join in it have waited."""
        now, resident = self.clock(), self._resident
        for new in output.scheduled_new_reqs:
            state = resident.get(new.run_id)
            if state is not None and not state.attempt:
                state.queued_s = now - state.submitted

    def _retire(self, state: RequestState, among: dict[str, RequestState]) -> None:
        """It is planned for no more while it is ``among`` these."""
        state.retired = True
        among[state.run_id] = state
        self.policy.retire(state)

    def _stays(self, state: RequestState) -> None:
        """Its end was expected, and has not come; or it was outside, or aside, and is no more."""
        state.retired = False
        self._unlist(state)
        self.policy.stay(state)

    def _observe(self, state: RequestState, report: RequestReport) -> None:
        """Notes the batch key, who is kept out or aside, and whose last step was not the end, as of another loop."""
        changed = report.batch_key is not None and report.batch_key != state.batch_key
        among = self._outside if not report.stage else self._aside if report.aside and self._can_stay else None
        if state.retired and (changed or not (report.finished or state.run_id in (among or ()))):
            self._stays(state)
        if changed:
            state.batch_key, state.total_steps = report.batch_key, report.total_steps
            self.demands.learn(state, report)
            self.policy.observe(state)
        if among is not None and not state.retired:
            self._near.pop(state.run_id, None)
            self._retire(state, among)

    def _conclude(self, state: RequestState, report: RequestReport) -> Event:
        """The terminal event of a request whose program is done; the worker has dropped it already."""
        self._end(state)
        return outcome(state, report, self.clock())

    def restart(self, request_ids: Iterable[str] | None = None, why: str = "its worker died") -> list[Event]:
        """Replays requests whose worker is gone."""
        flying = Counter(run for output in self._flights for run in output.run_ids)
        if request_ids is None:
            self._forget.clear()
            lost = list(self._resident.values())
        else:
            alive = (self._alive.get(request_id) for request_id in dict.fromkeys(request_ids))
            lost = [state for state in alive if state is not None and state.resident]
        left = self._resident.keys() - {state.run_id for state in lost}
        self._flights = deque(output for output in self._flights if not left.isdisjoint(output.run_ids))
        lost.sort(key=lambda state: state.arrival)
        # Each tick in flight may have been in the midst of one more step of it.
        suspects = {state.request_id: state.steps + flying[state.run_id] for state in lost if state.run_id in flying}
        alone = len(suspects) == 1 and flying.keys() <= self._resident.keys()  # Else it may be one that was aborted.
        guilty = self._quarantine.died(suspects, [state.request_id for state in lost], why, alone=alone)
        events = self._replay(lost, guilty)
        self._door.close(self._alive.values())
        return events

    def recall(self) -> list[Event]:
        """Replays all that the worker holds, which nobody is to blame for."""
        self._forget.clear()
        self._flights.clear()
        return self._replay(sorted(self._resident.values(), key=lambda state: state.arrival), ())

    def _replay_lost(self, output: SchedulerOutput, result: RunnerOutput) -> list[Event]:
        """Replays the live members of a tick that the worker did not mention: it does not hold them."""
        mentioned = {report.run_id for report in result.reports}
        states = (self._resident.get(run) for run in output.run_ids if run not in mentioned)
        lost = sorted((state for state in states if state is not None), key=lambda state: state.arrival)
        return self._replay(lost, [one.request_id for one in lost if self._quarantine.lost(one.request_id)])

    def _replay(self, lost: list[RequestState], guilty: Collection[str]) -> list[Event]:
        """Puts residents back to the front of the queue as their next attempt, in the order of arrival."""
        events: list[Event] = []
        for state in reversed(lost):
            request_id = state.request_id
            if request_id in guilty:
                events.append(Failed(request_id=request_id, error=self._quarantine.verdict(request_id)))
                self._end(state)
                continue
            self._remove(state)
            state.begin_attempt(self._new_run_id(request_id))
            self._alive[request_id] = state
            self._intake.enters(state)
            self._door.enqueue(state, front=True)
            events.append(Restarted(request_id=request_id, attempt=state.attempt))
        return events[::-1]
