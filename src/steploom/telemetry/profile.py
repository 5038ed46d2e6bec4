"""ProfileObserver: a Chrome trace of an engine's ticks and requests, for chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

import os
import time
from pathlib import Path

from steploom.errors import SteploomError
from steploom.protocol import RequestReport, RunnerOutput, SchedulerOutput
from steploom.requests import DiffusionOutput, DiffusionRequest
from steploom.telemetry.lives import Life, Lives
from steploom.telemetry.outcomes import outcome_of
from steploom.telemetry.trace_file import Field, TraceFile

ENGINE, REQUESTS = 1, 2
"""The two groups of tracks."""

MAX_EVENTS = 1_000_000
"""Some 150 MB."""


class ProfileObserver(Lives):
    """Writes what an engine does into a file that chrome://tracing and Perfetto show.

    ::

        with ProfileObserver("trace.json") as profile:
            engine.observers.append(profile)
            ...

    One track has the ticks (``args``: seconds in the worker, of these in forwards, how many requests stepped), and
    each request has one with its phases and, within these, its steps; joining and leaving are instants. The file is
    written by a thread, a second behind at most, and is valid JSON whenever one looks.

    Args:
        path: The file; what it held is lost.
        max_events: After so many the file is full; the last event says so.

    Raises:
        OSError: The file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], *, max_events: int = MAX_EVENTS) -> None:
        super().__init__()
        self._zero = time.monotonic()
        self._tracks = 0
        self._file = TraceFile(Path(path), max_events)
        self._name("process_name", ENGINE, 0, "engine")
        self._name("thread_name", ENGINE, 0, "ticks")
        self._name("process_name", REQUESTS, 0, "requests")

    def __enter__(self) -> ProfileObserver:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Writes what is left, and closes the file. Idempotent; later events are dropped."""
        self._file.close()

    def born(self, request: DiffusionRequest, at: float) -> Life:
        """A track for it."""
        self._tracks += 1
        self._name("thread_name", REQUESTS, self._tracks, request.request_id)
        return _Tracked(request.request_id, at, self._tracks)

    def on_schedule(self, output: SchedulerOutput, at: float) -> None:
        """Who joins."""
        super().on_schedule(output, at)
        for new in output.scheduled_new_reqs:
            self._instant("join", self._runs.get(new.run_id), at, tick=output.tick)

    def on_tick(self, output: SchedulerOutput, result: RunnerOutput, began: float, ended: float) -> None:
        """The tick, with what it was made of."""
        steps = sum(report.stepped for report in result.reports)
        self._span(
            f"tick {output.tick}", ENGINE, 0, began, ended, tick=output.tick, worker_s=result.seconds,
            forward_s=result.forward_s, warmup_s=result.warmup_s, scheduled=len(result.reports), steps=steps,
            alone=sum(result.alone.values()),
        )  # fmt: skip
        super().on_tick(output, result, began, ended)

    def reported(self, life: Life, report: RequestReport, began: float, ended: float) -> None:
        """A step of it."""
        if report.stepped:
            assert isinstance(life, _Tracked)
            begin = began + report.encode_s if life.phase == "encode" else began
            self._span(
                f"step {report.step}", REQUESTS, life.track, min(begin, ended),
                max(ended - report.decode_s, min(begin, ended)), step=report.step, total_steps=report.total_steps,
                batch_requests=report.batch_requests, rows=report.rows,
            )  # fmt: skip

    def passed(self, life: Life, phase: str, began: float, ended: float) -> None:
        """A phase of it."""
        assert isinstance(life, _Tracked)
        self._span(phase, REQUESTS, life.track, began, ended)

    def lost(self, life: Life, at: float) -> None:
        """An instant."""
        self._instant("restarted", life, at, attempt=life.attempt)

    def gone(self, life: Life, output: DiffusionOutput | None, error: SteploomError | None, at: float) -> None:
        """An instant."""
        self._instant("leave", life, at, outcome=outcome_of(error))

    def _instant(self, name: str, life: Life | None, at: float, **args: Field) -> None:
        if isinstance(life, _Tracked):
            self._file.add(("i", name, REQUESTS, life.track, self._micros(at), None, args))

    def _span(self, name: str, group: int, track: int, began: float, ended: float, **args: Field) -> None:
        start = self._micros(began)
        self._file.add(("X", name, group, track, start, max(0.0, self._micros(ended) - start), args))

    def _name(self, what: str, group: int, track: int, name: str) -> None:
        self._file.add(("M", what, group, track, 0.0, None, {"name": name}))

    def _micros(self, at: float) -> float:
        return (at - self._zero) * 1e6


class _Tracked(Life):
    """A request that has a track."""

    __slots__ = ("track",)

    def __init__(self, request_id: str, submitted: float, track: int) -> None:
        super().__init__(request_id, submitted)
        self.track = track
