"""ProfileObserver: a Chrome trace of an engine's ticks and requests, for chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, cast

from steploom.errors import SteploomError
from steploom.protocol import RunnerOutput, SchedulerOutput
from steploom.requests import DiffusionOutput, DiffusionRequest
from steploom.telemetry.lives import Life, Lives
from steploom.telemetry.outcomes import outcome_of
from steploom.telemetry.trace_file import Field, TraceEvent, TraceFile

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
        """The tick, with what it was made of, and the steps of requests."""
        steps: list[_Step] = []
        for report in result.reports:
            life = self._runs.get(report.run_id)
            if life is not None and report.stepped:
                assert isinstance(life, _Tracked)
                begin = began + report.encode_s if life.phase == "encode" else began
                steps.append((life.track, begin, report.decode_s, report.step, report.total_steps,
                              report.batch_requests, report.rows))  # fmt: skip
        alone = sum(result.alone.values())
        seconds = (result.seconds, result.forward_s, result.warmup_s)
        self._file.add(
            1 + len(steps), self._tick, output.tick, began, ended, seconds, len(result.reports), alone, steps
        )  # fmt: skip
        super().on_tick(output, result, began, ended)

    def _tick(
        self, tick: int, began: float, ended: float, seconds: tuple[float, ...], scheduled: int, alone: int,
        steps: list[_Step],
    ) -> list[TraceEvent]:  # fmt: skip
        """The events of a tick; made in the file's thread."""
        worker_s, forward_s, warmup_s = seconds
        args: dict[str, Field] = {
            "tick": tick, "worker_s": worker_s, "forward_s": forward_s, "warmup_s": warmup_s, "scheduled": scheduled,
            "steps": len(steps), "alone": alone,
        }  # fmt: skip
        events = [self._span(f"tick {tick}", ENGINE, 0, began, ended, args)[0]]
        for track, begin, decode_s, step, total, mates, rows in steps:
            begin = min(begin, ended)
            told: dict[str, Field] = {"step": step, "total_steps": total, "batch_requests": mates, "rows": rows}
            events += self._span(f"step {step}", REQUESTS, track, begin, max(ended - decode_s, begin), told)
        return events

    def passed(self, life: Life, phase: str, began: float, ended: float) -> None:
        """A phase of it."""
        assert isinstance(life, _Tracked)
        self._file.add(1, self._span, phase, REQUESTS, life.track, began, ended, {})

    def lost(self, life: Life, at: float) -> None:
        """An instant."""
        self._instant("restarted", life, at, attempt=life.attempt)

    def gone(self, life: Life, output: DiffusionOutput | None, error: SteploomError | None, at: float) -> None:
        """An instant."""
        self._instant("leave", life, at, outcome=outcome_of(error))

    def _instant(self, name: str, life: Life | None, at: float, **args: Field) -> None:
        if isinstance(life, _Tracked):
            self._file.add(1, _event, "i", name, REQUESTS, life.track, self._micros(at), None, args)

    def _span(
        self, name: str, group: int, track: int, began: float, ended: float, args: dict[str, Field]
    ) -> list[TraceEvent]:
        start = self._micros(began)
        return [("X", name, group, track, start, max(0.0, self._micros(ended) - start), args)]

    def _name(self, what: str, group: int, track: int, name: str) -> None:
        self._file.add(1, _event, "M", what, group, track, 0.0, None, {"name": name})

    def _micros(self, at: float) -> float:
        return (at - self._zero) * 1e6


def _event(*event: Any) -> list[TraceEvent]:
    return [cast("TraceEvent", event)]


_Step = tuple[int, float, float, int, int | None, float, int]
"""Track, begin, seconds of decoding, step, steps in all, requests that shared it, rows."""


class _Tracked(Life):
    """A request that has a track."""

    __slots__ = ("track",)

    def __init__(self, request_id: str, submitted: float, track: int) -> None:
        super().__init__(request_id, submitted)
        self.track = track
