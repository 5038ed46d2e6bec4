"""How requests end, in one word."""

from __future__ import annotations

from contextvars import ContextVar

from steploom.errors import DeadlineExceeded, InvalidRequest, RequestCancelled

OUTCOMES = ("completed", "failed", "cancelled", "timed_out", "refused", "invalid")
"""All of them. ``refused`` had no place in the queue; ``invalid`` does not fit the pipeline or the limits."""


ENOUGH: ContextVar[bool] = ContextVar("steploom_enough", default=False)
"""Whether a request that is left here is left because its client has all that it wants: a text, at a stop sequence."""


def outcome_of(error: Exception | None) -> str:
    """How a request that the engine had accepted ended: ``error`` is None where it has an output."""
    if error is None or (isinstance(error, RequestCancelled) and ENOUGH.get()):
        return "completed"
    if isinstance(error, RequestCancelled):
        return "cancelled"
    return "timed_out" if isinstance(error, DeadlineExceeded) else "failed"


def refusal_of(error: Exception) -> str:
    """How a request ended that the engine has not accepted."""
    return "invalid" if isinstance(error, InvalidRequest) else "refused"


def kind_of(error: Exception) -> str:
    """The class of an error, of the pipeline's own where it raised. Without its message, which may hold a prompt."""
    name, colon, _ = str(error).partition(":")
    raised = type(error).__name__ == "GenerationFailed" and colon and name.isidentifier()
    return name if raised else type(error).__name__
