"""Every exception that steploom raises, in one tree.

::

    SteploomError
    ├── ConfigError                 a setting is wrong; raised before anything starts
    ├── RequestError                one request is at fault; the engine lives on
    │   ├── InvalidRequest    400   a field, its value and the mend are named
    │   ├── QueueFull         429   the bounded waiting queue has no place
    │   ├── RequestCancelled  499   aborted by somebody else
    │   ├── GenerationFailed  500   the pipeline's own code raised
    │   └── DeadlineExceeded  504   ``timeout`` passed; also a TimeoutError
    └── EngineError           503   the engine cannot serve
        ├── EngineNotRunning        not started, or already closed
        ├── EngineDead              a fault from which there is no way back
        ├── WorkerDied              carries ``rank`` and ``exitcode``
        ├── TickTimeout             a worker took longer for a tick or a call than it may
        └── ProtocolError           a message that does not fit the protocol

Errors cross process boundaries as text (:class:`steploom.protocol.ErrorInfo`): an exception object holds frames, and
frames hold tensors.
"""

from __future__ import annotations


class SteploomError(Exception):
    """Base of all exceptions of this library."""

    status: int = 500
    """HTTP status that fits."""


class ConfigError(SteploomError):
    """A setting is wrong: the message names the field, the value and the mend."""


class RequestError(SteploomError):
    """One request failed; the engine and all other requests go on."""


class InvalidRequest(RequestError, ValueError):
    """The request itself is wrong.

    Args:
        message: Names the field, the value and the mend.
        field: The offending field, for ``param`` of HTTP error objects.
    """

    status = 400

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class QueueFull(RequestError):
    """The bounded waiting queue has no place left.

    Args:
        message: States the bound and the field that sets it.
        retry_after_s: Seconds after which a new try makes sense, when known.
    """

    status = 429

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RequestCancelled(RequestError):
    """The request was aborted by ``engine.abort``, or by closing or draining the engine.

    Args:
        message: Says by which.
        drained: Whether it was not done when an engine was drained: another one, or this one later, may do it. Its
            HTTP status is 503 then, which asks for that.
    """

    status = 499

    def __init__(self, message: str, *, drained: bool = False) -> None:
        super().__init__(message)
        self.drained = drained
        if drained:
            self.status = EngineError.status


class GenerationFailed(RequestError):
    """The pipeline raised while it ran this request.

    Args:
        message: The pipeline's own words.
        remote_traceback: The traceback as text, from wherever the pipeline ran.
    """

    status = 500

    def __init__(self, message: str, *, remote_traceback: str = "") -> None:
        super().__init__(message)
        self.remote_traceback = remote_traceback
        if remote_traceback:
            self.add_note(remote_traceback)


class DeadlineExceeded(RequestError, TimeoutError):
    """The request's ``timeout`` passed before its result was there."""

    status = 504


class EngineError(SteploomError):
    """The engine cannot serve."""

    status = 503


class EngineNotRunning(EngineError):
    """The engine was not started, is closed, or belongs to another event loop."""


class EngineDead(EngineError):
    """A fault ended the engine; start a new one."""


class WorkerDied(EngineError):
    """A worker process ended by itself.

    Args:
        rank: Which worker.
        exitcode: Its exit code; minus the signal's number if a signal ended it; None if unknown.
        detail: The last lines that it printed, when known.
    """

    def __init__(self, rank: int, exitcode: int | None, detail: str = "") -> None:
        self.rank = rank
        self.exitcode = exitcode
        super().__init__(self.cause + (f": {detail}" if detail else ""))

    @property
    def cause(self) -> str:
        """What it died of, without what it printed."""
        return f"worker {self.rank} died" + ("" if self.exitcode is None else f" with exit code {self.exitcode}")


class TickTimeout(EngineError):
    """A worker did not answer in time: a tick within ``tick_timeout_s``, or a call within what bounds it."""


class ProtocolError(EngineError):
    """A message between engine and worker does not fit the protocol."""


LONGEST = 1 << 16
"""Characters that are told of an error, and of its traceback."""


def words_of(error: BaseException) -> str:
    """What an error says, such that it can be told: of a stranger's, which may say nothing, or anything."""
    try:
        said = str(error)
    except Exception:  # noqa: BLE001 - an exception that cannot say what it is
        return "(its message cannot be made)"
    return told(said)


def raised(error: BaseException) -> str:
    """What was raised, in one line: its type, and what it says, if anything: ``SystemExit`` mostly does not."""
    said = " ".join(words_of(error).split())
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def told(text: str) -> str:
    """``text`` in UTF-8, and not longer than :data:`LONGEST`: of more its beginning and its end."""
    if len(text) > LONGEST:
        half = LONGEST // 2
        text = f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"
    return text.encode("utf-8", "backslashreplace").decode()


def unusable(error: ImportError) -> str:
    """What an import that failed says of the installation: that a package is missing, or installed and broken."""
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        return f"{error.name} is missing"
    return f"what it needs is installed but does not import ({' '.join(str(error).split())}; see `steploom doctor`)"
