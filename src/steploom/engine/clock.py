"""Clock: the scheduler's, which can be put back for a request that was accepted elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator


class Clock:
    """``time.monotonic()``, in seconds, but while it is put back."""

    def __init__(self) -> None:
        self._then: float | None = None

    def __call__(self) -> float:
        """The time."""
        return time.monotonic() if self._then is None else self._then

    @contextlib.contextmanager
    def as_of(self, then: float) -> Generator[None]:
        """It is ``then`` meanwhile: what happens counts as having happened at that time."""
        self._then = then
        try:
            yield
        finally:
            self._then = None
