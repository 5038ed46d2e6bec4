"""TraceFile: events in Chrome's JSON array format, written by a thread, valid JSON after each write."""

from __future__ import annotations

import json
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from io import BufferedIOBase
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

WRITE_EVERY_S = 1.0
MOST_WAITING = 65_536
"""Notes (a tick is one) that may wait for a slow disk; what comes then is dropped, and counted."""

Field = str | int | float | None
TraceEvent = tuple[str, str, int, int, float, float | None, dict[str, Field]]
"""Phase, name, process, thread, microseconds, duration in microseconds or None, arguments."""

Maker = Callable[..., Sequence[TraceEvent]]
"""Makes events of what was noted; called in the thread."""

_END = b"\n]\n"


class TraceFile:
    """A file of trace events.

    Every write ends the array, and the next one begins where that end was; so whatever ends the process, what has been
    written can be loaded. A file that cannot be rewound (a pipe) is ended by :meth:`close` alone.

    Args:
        path: The file; what it held is lost.
        max_events: After so many it is full.

    Raises:
        OSError: The file cannot be written.
    """

    def __init__(self, path: Path, max_events: int) -> None:
        self._path = path
        self._file: BufferedIOBase = path.open("wb")
        self._left = max_events
        self._written = False
        self._dropped = 0
        self._waiting: deque[tuple[Maker, tuple[Any, ...]]] = deque()
        self._filled = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="steploom-profile", daemon=True)
        self._thread.start()

    def add(self, count: int, make: Maker, *noted: Any) -> None:
        """Has the ``count`` events that ``make(*noted)`` will be written soon; never waits."""
        if self._left <= 0 or self._closing.is_set():
            return
        if len(self._waiting) >= MOST_WAITING:
            self._dropped += count
            return
        self._left -= count
        if self._left <= 0:
            self._left = 0
            log.warning("%s: the trace is full", self._path)
            make, noted = _full, (make, noted)
        self._waiting.append((make, noted))
        if not self._filled.is_set():
            self._filled.set()

    def close(self) -> None:
        """Writes what waits, and closes the file. Idempotent."""
        self._closing.set()
        self._filled.set()
        self._thread.join()

    def _work(self) -> None:
        """The thread: writes in bursts, and sleeps while nothing happens."""
        try:
            with self._file:
                while not self._closing.is_set():
                    self._filled.wait()
                    self._closing.wait(WRITE_EVERY_S)
                    self._filled.clear()
                    self._write()
                self._write()
                if not self._written:
                    self._file.write(b"[]\n")
                elif not self._file.seekable():
                    self._file.write(_END)
        except OSError as error:
            log.warning("%s: the trace ends here: %s", self._path, error)
            self._closing.set()

    def _write(self) -> None:
        noted = [self._waiting.popleft() for _ in range(len(self._waiting))]
        waiting = [event for make, what in noted for event in make(*what)]
        if self._dropped and waiting:
            last = waiting[-1]
            waiting.append(("i", f"{self._dropped} events dropped", last[2], last[3], last[4], None, {}))
            self._dropped = 0
        if not waiting:
            return
        text = ",\n".join(map(_json, waiting)).encode()
        rewinds = self._file.seekable()
        if rewinds and self._written:
            self._file.seek(-len(_END), 2)
        self._file.write((b",\n" if self._written else b"[\n") + text + (_END if rewinds else b""))
        self._file.flush()
        self._written = True


def _full(make: Maker, noted: tuple[Any, ...]) -> Sequence[TraceEvent]:
    """Instead of the events for which there is no place."""
    _, _, group, track, at, _, _ = make(*noted)[0]
    return [("i", "the trace is full", group, track, at, None, {})]


def _json(event: TraceEvent) -> str:
    kind, name, group, track, at, duration, args = event
    told: dict[str, object] = {"ph": kind, "name": name, "pid": group, "tid": track, "ts": round(at, 3), "args": args}
    if duration is not None:
        told["dur"] = round(duration, 3)
    if kind == "i":
        told["s"] = "t"
    return json.dumps(told)
