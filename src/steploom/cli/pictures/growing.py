"""Text that grows on the terminal while a language model commits it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress


class GrowingText:
    """Writes what one request commits to standard output, at once; what is committed is never taken back.

    Args:
        progress: The bars, which make way for the text.
        live: Whether to write at all. A pipe or a file gets the whole text when it is there.
    """

    def __init__(self, progress: Progress, *, live: bool) -> None:
        self._progress = progress
        self._live = live and sys.stdout.isatty()
        self._written = ""

    def hear(self, event: Any) -> None:
        """Writes a commit; other events are not for it."""
        from steploom import Commit, Restarted

        if isinstance(event, Restarted):
            self.break_off()
        if self._live and isinstance(event, Commit) and isinstance(event.text, str):
            self._progress.stop()
            self._write(event.text)
            self._written += event.text

    def break_off(self) -> None:
        """What follows starts on a line of its own."""
        if self._written:
            self._write("\n")
        self._written = ""

    def finish(self, text: str) -> None:
        """Writes what is left of the whole ``text``."""
        if not text.startswith(self._written):
            self.break_off()
        self._write(text.removeprefix(self._written) + "\n")
        self._written = ""

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
