"""The log of ``steploom serve`` is written by a thread: whoever does not read it holds up nobody."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
from collections.abc import Generator
from typing import Any, cast

from steploom.config import LONGEST_S

MOST_LINES = 10_000
"""Lines that wait to be written; more are dropped, and counted."""


class Beside(logging.Handler):
    """Formats records where they are logged, and writes them in a thread.

    Args:
        target: Says where to, and how. Its stream is a file of the system.
        last_s: Seconds in which somebody must have read the last lines; :meth:`close` does not wait longer.
    """

    def __init__(self, target: logging.StreamHandler[Any], last_s: float) -> None:
        super().__init__(target.level)
        self._last_s = min(last_s, LONGEST_S)
        self.setFormatter(target.formatter)
        self._file: int = target.stream.fileno()
        self._lines: queue.Queue[str | None] = queue.Queue(MOST_LINES)
        self._dropped = 0
        self._thread = threading.Thread(target=self._write, name="steploom-log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Returns at once."""
        try:
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            self._dropped += 1
        except Exception:  # noqa: BLE001 - as logging has it: a line that cannot be told is no reason to fail
            self.handleError(record)

    def close(self) -> None:
        """Waits a moment for the last lines."""
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(None)
        self._thread.join(self._last_s)
        super().close()

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            with contextlib.suppress(OSError):  # nobody reads any more
                self._put(line)
                if self._dropped:
                    dropped, self._dropped = self._dropped, 0
                    said = {"name": __name__, "levelno": logging.WARNING, "levelname": "WARNING"}
                    self._put(self.format(logging.makeLogRecord({**said, "msg": f"{dropped} lines were dropped"})))

    def _put(self, line: str) -> None:
        """Past the stream's buffer: its lock would be held when the interpreter wants to end."""
        data = f"{line}\n".encode(errors="backslashreplace")
        while data:
            data = data[os.write(self._file, data) :]


@contextlib.contextmanager
def written_beside(last_s: float) -> Generator[None]:
    """Meanwhile whatever the root logger writes to files of the system is written in threads.

    The end waits ``last_s`` seconds, at most, for the last lines to be read.
    """
    root = logging.getLogger()
    before = root.handlers
    root.handlers = [_beside(one, last_s) for one in before]
    threads = [one for one in root.handlers if isinstance(one, Beside)]
    try:
        yield
    finally:
        root.handlers = before
        for one in threads:
            one.close()


def _beside(handler: logging.Handler, last_s: float) -> logging.Handler:
    target: Any = handler
    if isinstance(target, logging.StreamHandler):
        with contextlib.suppress(OSError, AttributeError):  # it writes to no file of the system
            return Beside(cast("logging.StreamHandler[Any]", target), last_s)
    return handler
