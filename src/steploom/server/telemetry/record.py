"""Record: what is known of the HTTP request that is being served, for the log lines that are written meanwhile."""

from __future__ import annotations

import uuid
from contextvars import ContextVar
from typing import Any

_LONGEST_ID = 128
_WORST_FIRST = ("failed", "timed_out", "refused", "invalid", "cancelled", "completed")


class Record:
    """One HTTP request, with the requests of the engine that it became.

    Args:
        given: The id that its client gave it; one that cannot be logged is replaced.

    Attributes:
        request_id: Its id.
        trace_id: Of the trace that it belongs to, as hexadecimal digits; None if to none.
        status: Of the response, once that has begun.
        ended: Whether its line was written.
    """

    def __init__(self, given: str | None) -> None:
        fits = given is not None and given.isprintable() and 0 < len(given) <= _LONGEST_ID
        self.request_id = given if given is not None and fits else f"req_{uuid.uuid4().hex}"
        self.trace_id: str | None = None
        self.status: int | None = None
        self.ended = False
        self._parts: list[dict[str, Any]] = []

    def add(self, part: dict[str, Any]) -> None:
        """A request of the engine has ended like ``part``, fields of its line."""
        self._parts.append(part)

    @property
    def outcome(self) -> str | None:
        """How its requests of the engine ended: the worst of them; None if there were none."""
        outcomes = {part["outcome"] for part in self._parts}
        return next((outcome for outcome in _WORST_FIRST if outcome in outcomes), None)

    def fields(self) -> dict[str, Any]:
        """What its requests of the engine add to its line: sums, the longest wait, the mean over all steps."""
        if not self._parts:
            return {}
        parts = self._parts
        steps = sum(part.get("steps", 0) for part in parts)
        shared = sum(part.get("steps", 0) * part.get("batch_requests", 0) for part in parts)
        errors = [part["error"] for part in parts if part.get("error") and part["outcome"] == self.outcome]
        return {
            "outcome": self.outcome, "requests": len(parts),
            "queued_s": round(max(part.get("queued_s", 0) for part in parts), 6), "steps": steps,
            "batch_requests": round(shared / steps, 3) if steps else 0, **({"error": errors[0]} if errors else {}),
        }  # fmt: skip


RECORD: ContextVar[Record | None] = ContextVar("steploom_record", default=None)
"""The request that is being served where this is asked."""
