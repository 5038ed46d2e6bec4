"""Lives: an observer that follows each request through its phases: queued, encode, denoise, decode."""

from __future__ import annotations

import time

from steploom.engine.observer import EngineObserver
from steploom.errors import RequestError, SteploomError
from steploom.protocol import RequestReport, RunnerOutput, SchedulerOutput
from steploom.requests import DiffusionOutput, DiffusionRequest

PHASES = ("queued", "encode", "denoise", "decode")


class Life:
    """One request, from its acceptance to its outcome.

    Attributes:
        request_id: Its id.
        submitted: When it was accepted.
        phase: One of :data:`PHASES`: where it stands.
        since: When that phase began.
        run_id: Under which id a worker holds it; None while it waits.
        joined: When it was decided that it joins. The worker may have been busy with another tick then.
        attempt: From 0; more if a worker has lost it.
        steps: Steps done, of this attempt.
        calls: Ticks with denoiser calls of it, of this attempt.
        mates: How many requests shared these, summed.
        skipped: Steps that its step cache has answered, of this attempt.
        previewed: Whether a preview of it was there already.
    """

    __slots__ = ("attempt", "calls", "joined", "mates", "phase", "previewed", "request_id", "run_id", "since",
                 "skipped", "steps", "submitted")  # fmt: skip

    def __init__(self, request_id: str, submitted: float) -> None:
        self.request_id = request_id
        self.submitted = self.since = self.joined = submitted
        self.phase = "queued"
        self.run_id: str | None = None
        self.attempt = 0
        self.previewed = False
        self.begin_again()

    def begin_again(self) -> None:
        """Nothing was done for it yet."""
        self.steps = self.calls = self.skipped = 0
        self.mates = 0.0

    @property
    def mean_batch_requests(self) -> float:
        """How many requests shared its denoiser calls on average, itself included; 0 before the first."""
        return self.mates / self.calls if self.calls else 0.0


class Lives(EngineObserver):
    """Follows requests. A subclass overrides what it wants to be told; all times are those of ``time.monotonic()``.

    A request that it has not seen being queued is nobody's concern here. What a worker does within a tick is known by
    its duration alone: a prompt is encoded at the begin of its tick, and a result decoded at its end.
    """

    def __init__(self) -> None:
        self._lives: dict[str, Life] = {}
        self._runs: dict[str, Life] = {}

    def born(self, request: DiffusionRequest, at: float) -> Life | None:
        """``request`` waits; returns whom to follow, None for nobody."""
        return Life(request.request_id, at)

    def passed(self, life: Life, phase: str, began: float, ended: float) -> None:
        """A phase is over."""

    def lost(self, life: Life, at: float) -> None:
        """A worker has lost the request, which waits again."""

    def gone(self, life: Life, output: DiffusionOutput | None, error: SteploomError | None, at: float) -> None:
        """The request has its outcome. Its last phase is over, and was told."""

    def on_queued(self, request: DiffusionRequest) -> None:
        """Follows it from now on."""
        life = self.born(request, time.monotonic())
        if life is not None:
            self._lives[life.request_id] = life

    def on_refused(self, request: DiffusionRequest, error: RequestError) -> None:
        """It never lived."""

    def on_schedule(self, output: SchedulerOutput, at: float) -> None:
        """Who joins is followed; it waits until the worker turns to that tick, which may be sent ahead."""
        for new in output.scheduled_new_reqs:
            life = self._lives.get(new.request.request_id)
            if life is not None:
                life.run_id, life.joined = new.run_id, at
                self._runs[new.run_id] = life

    def on_tick(self, output: SchedulerOutput, result: RunnerOutput, began: float, ended: float) -> None:
        """Takes in every report of those who live. Called in every tick: what every step needs is inlined."""
        runs = self._runs
        if not runs:
            return
        for report in result.reports:
            life = runs.get(report.run_id)
            if life is None:
                continue
            if report.stepped:
                life.steps += 1
                life.skipped = report.skipped_steps
            if report.batch_requests:
                life.calls += 1
                life.mates += report.batch_requests
            if report.phase != life.phase:
                self._follow(life, report, began, ended)

    def on_restarted(self, request_id: str, attempt: int) -> None:
        """It waits again."""
        life = self._lives.get(request_id)
        if life is not None:
            at = time.monotonic()
            self._leave(life)
            life.attempt = attempt
            life.begin_again()
            self._enter(life, "queued", at)
            self.lost(life, at)

    def on_end(self, request_id: str, output: DiffusionOutput | None, error: SteploomError | None) -> None:
        """Follows it no more."""
        life = self._lives.pop(request_id, None)
        if life is not None:
            at = time.monotonic()
            self._leave(life)
            self.passed(life, life.phase, life.since, at)
            self.gone(life, output, error, at)

    def _follow(self, life: Life, report: RequestReport, began: float, ended: float) -> None:
        """Enters the phases that a tick has led to. One that failed is left where it failed."""
        failed = report.error is not None
        if life.phase == "queued":
            self._enter(life, "encode", max(began, life.joined))
        if life.phase == "encode" and (not failed or report.step or report.denoise_s):
            self._enter(life, "denoise", min(max(began, life.since) + report.encode_s, ended))
        if life.phase == "denoise" and report.phase in ("decode", "done") and (not failed or report.decode_s):
            self._enter(life, "decode", max(ended - report.decode_s, life.since))
        elif life.phase == "decode" and report.phase == "denoise":  # the next stage of a cascade
            self._enter(life, "denoise", max(began, life.since))

    def _enter(self, life: Life, phase: str, at: float) -> None:
        before, since = life.phase, life.since
        life.phase, life.since = phase, at
        self.passed(life, before, since, at)

    def _leave(self, life: Life) -> None:
        if life.run_id is not None:
            if life.phase == "queued":  # no tick of it has ended
                self._enter(life, "encode", life.joined)
            self._runs.pop(life.run_id, None)
            life.run_id = None
