"""BaseScheduler: states, ids, attempts, capacity, clean-up. Order and batch choice are the policy's."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

from steploom.config import EngineConfig
from steploom.errors import GenerationFailed, InvalidRequest, ProtocolError, QueueFull, RequestError
from steploom.protocol import NewRequest, RequestReport, RunnerOutput, SchedulerOutput, TextRows, run_id
from steploom.requests import (
    Commit,
    DiffusionOutput,
    DiffusionRequest,
    Draft,
    Event,
    Failed,
    Finished,
    Queued,
    Restarted,
    StepEvent,
    Timings,
)
from steploom.sched.interface import SchedulerInterface
from steploom.sched.policy import Batch, Policy
from steploom.sched.state import Clock, RequestState, guess_key


class BaseScheduler(SchedulerInterface):
    """Everything but the capacity, which a subclass gives by :meth:`_choose`.

    A request is *waiting* (in ``_alive`` only), *resident* (in ``_alive`` and ``_resident``) or gone. What the workers
    must be told to forget is in ``_forget``: the run ids of residents that ended on our side. A worker drops by itself
    what it reported as finished, and never heard of what ended while it waited, so it is told of neither.
    """

    def __init__(self, config: EngineConfig, policy: Policy, clock: Clock) -> None:
        self.config = config
        self.policy = policy
        self.clock = clock
        self._tick = 0
        self._arrivals = 0
        self._runs = 0
        self._alive: dict[str, RequestState] = {}
        self._resident: dict[str, RequestState] = {}
        self._forget: dict[str, None] = {}

    @abstractmethod
    def _choose(self) -> Batch:
        """Asks the policy for the members of a tick, within this scheduler's capacity."""

    @property
    def num_waiting(self) -> int:
        """Requests that were accepted and that no worker holds."""
        return len(self._alive) - len(self._resident)

    @property
    def num_running(self) -> int:
        """Requests that a worker holds."""
        return len(self._resident)

    @property
    def has_work(self) -> bool:
        """Whether :meth:`schedule` would emit something."""
        return bool(self._alive or self._forget)

    def add_request(self, request: DiffusionRequest) -> Queued:
        """Accepts a request into the waiting queue."""
        request_id, position = request.request_id, self.num_waiting
        if request_id in self._alive:
            raise InvalidRequest(
                f"request_id={request_id!r}: a live request has this id; choose another or leave it out",
                field="request_id",
            )
        if position >= self.config.max_waiting:
            raise QueueFull(f"max_waiting={self.config.max_waiting}: as many requests wait already; try again later")
        if type(request.priority) is not int:
            raise InvalidRequest(
                f"priority={request.priority!r}: must be an integer; lower runs first", field="priority"
            )
        guess, run = guess_key(request), self._new_run_id(request_id)
        state = RequestState(request, self._arrivals, self.clock(), guess, run)
        self._arrivals += 1
        self._alive[request_id] = state
        self.policy.enqueue(state)
        return Queued(request_id=request_id, position=position)

    def _new_run_id(self, request_id: str) -> str:
        """A run id that was never used before.

        Attempts are numbered through, not per request: a request id may be used again while an answer that concerns its
        previous owner is still under way.
        """
        self._runs += 1
        return run_id(request_id, self._runs)

    def schedule(self) -> SchedulerOutput:
        """Decides one tick."""
        self._tick += 1
        batch_key, cached, joining = self._choose()
        new = self._admit(joining) if joining else []
        # The slot of an aborted resident may be given away in the tick that tells the worker to forget it: a worker
        # unwinds before it starts anything, so it never holds more than the limit.
        forget = list(self._forget)
        self._forget.clear()
        return SchedulerOutput(self._tick, new, cached, forget, batch_key)

    def _admit(self, joining: list[RequestState]) -> list[NewRequest]:
        """Makes waiting requests resident."""
        now, resident = self.clock(), self._resident
        new: list[NewRequest] = []
        for state in joining:
            state.resident = True
            resident[state.run_id] = state
            if state.queued_s is None:
                state.queued_s = now - state.submitted
            new.append(NewRequest(state.run_id, state.request))
        return new

    def update_from_output(self, output: SchedulerOutput, result: RunnerOutput) -> list[Event]:
        """Takes a worker's answer to ``output``."""
        if result.tick != output.tick:
            raise ProtocolError(f"tick={result.tick}: answers another tick than {output.tick}")
        events: list[Event] = []
        resident = self._resident
        # The hot loop of the host: what happens in every step of every request is inlined.
        for report in result.reports:
            state = resident.get(report.run_id)
            if state is None:
                if report.finished:
                    self._forget.pop(report.run_id, None)  # Ended on both sides at once: nothing left to forget.
                continue
            if report.batch_key != state.batch_key and report.batch_key is not None:
                state.batch_key = report.batch_key
                self.policy.observe(state)
            state.denoise_s += report.denoise_s
            if report.batch_requests:
                state.calls += 1
                state.mates += report.batch_requests
            if report.stepped:
                state.steps += 1
                # fmt: off
                events.append(StepEvent(
                    request_id=state.request_id, stage=report.stage, step=report.step, total_steps=report.total_steps,
                    sigma=report.sigma, batch_requests=report.batch_requests, skipped_steps=report.skipped_steps,
                    latents=report.latents, preview=report.preview,
                ))
                # fmt: on
            if report.commit is not None:
                events.append(_committed(state.request_id, report.commit))
            if report.draft is not None:
                events.append(_drafted(state.request_id, report.draft))
            if report.encode_s:
                state.encode_s += report.encode_s
            if report.decode_s:
                state.decode_s += report.decode_s
            if report.finished:
                events.append(self._conclude(state, report))
        if len(result.reports) < len(output.scheduled_cached_reqs) + len(output.scheduled_new_reqs):
            events += self._replay_lost(output, result)
        return events

    def _conclude(self, state: RequestState, report: RequestReport) -> Event:
        """The terminal event of a request whose program is done; the worker has dropped it already."""
        self._remove(state)
        request_id = state.request_id
        if report.error is not None:
            error = report.error.exception()
            if not isinstance(error, RequestError):
                error = GenerationFailed(report.error.message, remote_traceback=report.error.traceback)
            return Failed(request_id=request_id, error=error)
        output = DiffusionOutput(
            request_id=request_id,
            seed=state.request.seed,
            output=report.output,
            timings=self._timings(state, report.skipped_steps),
            trajectory_latents=report.trajectory_latents,
            trajectory_timesteps=report.trajectory_timesteps,
            frame_rate=report.frame_rate,
            sampling_rate=report.sampling_rate,
            texts=report.texts,
        )
        return Finished(request_id=request_id, output=output)

    def _timings(self, state: RequestState, skipped_steps: int) -> Timings:
        return Timings(
            queued_s=state.queued_s or 0.0,
            encode_s=state.encode_s,
            denoise_s=state.denoise_s,
            decode_s=state.decode_s,
            total_s=self.clock() - state.submitted,
            steps=state.steps,
            skipped_steps=skipped_steps,
            mean_batch_requests=state.mates / state.calls if state.calls else 0.0,
        )

    def finish_requests(self, request_ids: Iterable[str], error: RequestError) -> list[Event]:
        """Ends requests from outside."""
        events: list[Event] = []
        for request_id in request_ids:
            state = self._alive.get(request_id)
            if state is not None:
                if state.resident:
                    self._forget[state.run_id] = None
                self._remove(state)
                events.append(Failed(request_id=request_id, error=error))
        return events

    def restart(self, request_ids: Iterable[str] | None = None) -> list[Event]:
        """Replays requests whose worker is gone."""
        if request_ids is None:
            self._forget.clear()
            lost = list(self._resident.values())
        else:
            alive = (self._alive.get(request_id) for request_id in dict.fromkeys(request_ids))
            lost = [state for state in alive if state is not None and state.resident]
        return self._replay(lost, "its worker died")

    def _replay_lost(self, output: SchedulerOutput, result: RunnerOutput) -> list[Event]:
        """Replays the live members of a tick that the worker did not mention: it does not hold them."""
        mentioned = {report.run_id for report in result.reports}
        states = (self._resident.get(run) for run in output.run_ids if run not in mentioned)
        return self._replay([state for state in states if state is not None], "its worker lost it")

    def _replay(self, lost: list[RequestState], why: str) -> list[Event]:
        """Puts residents back to the front of the queue as their next attempt, in the order of arrival."""
        events: list[Event] = []
        for state in sorted(lost, key=lambda state: state.arrival, reverse=True):
            request_id = state.request_id
            self._remove(state)
            if state.attempt >= self.config.max_retries:
                message = f"gave up after attempt {state.attempt + 1}: {why} each time (max_retries={state.attempt})"
                events.append(Failed(request_id=request_id, error=GenerationFailed(message)))
                continue
            state.begin_attempt(self._new_run_id(request_id))
            self._alive[request_id] = state
            self.policy.enqueue(state, front=True)
            events.append(Restarted(request_id=request_id, attempt=state.attempt))
        return events[::-1]

    def _remove(self, state: RequestState) -> None:
        """Takes a live request out of all books."""
        del self._alive[state.request_id]
        if state.resident:
            del self._resident[state.run_id]
            self.policy.retire(state)
        else:
            self.policy.withdraw(state)


def _committed(request_id: str, rows: TextRows) -> Commit:
    text, tokens = _rows(rows)
    return Commit(
        request_id=request_id, text=text, tokens=tokens, prompt_tokens=rows.prompt_tokens, ended=rows.ended
    )  # fmt: skip


def _drafted(request_id: str, rows: TextRows) -> Draft:
    text, tokens = _rows(rows)
    return Draft(request_id=request_id, text=text, tokens=tokens)


def _rows(rows: TextRows) -> tuple[str | list[str] | None, list[Any]]:
    """Text and tokens of one row as they are, of several as lists."""
    texts, tokens = rows.texts, rows.tokens
    if len(tokens) == 1:
        return None if texts is None else texts[0], list(tokens[0])
    return texts, list(tokens)
