"""Stops: a text that grows, up to its first stop sequence."""

from __future__ import annotations

from collections.abc import Sequence


class Stops:
    """Gives of a text that grows what may be told: nothing of a stop sequence, nor of what may become one.

    Where the text is cut does not depend on the pieces in which it comes: at the sequence that is complete first.

    Args:
        sequences: None of them empty.

    Attributes:
        found: Whether one was there; nothing is told any more.
    """

    def __init__(self, sequences: Sequence[str]) -> None:
        self._sequences = sequences
        self._held = ""
        self.found = False

    def add(self, piece: str) -> str:
        """What may be told now that ``piece`` follows."""
        if self.found:
            return ""
        text, self._held = self._held + piece, ""
        ends = [(text.find(one) + len(one), text.find(one)) for one in self._sequences if one in text]
        if ends:
            self.found = True
            return text[: min(ends)[1]]
        kept = self._begun(text)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def rest(self) -> str:
        """What was held back: nothing follows that could make it a stop sequence."""
        text, self._held = self._held, ""
        return text

    def _begun(self, text: str) -> int:
        """How many characters at the end of ``text`` may be the beginning of a sequence."""
        longest = max((len(one) for one in self._sequences), default=1) - 1
        for kept in range(min(longest, len(text)), 0, -1):
            if any(one.startswith(text[-kept:]) for one in self._sequences):
                return kept
        return 0
