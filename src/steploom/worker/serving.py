"""What a worker does with the messages that it takes, whether it is a process or a thread."""

from __future__ import annotations

import importlib
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from steploom.config import EngineConfig
from steploom.errors import ConfigError, ProtocolError
from steploom.protocol import ErrorInfo, PipelineInfo, RunnerOutput, SchedulerOutput
from steploom.worker.messages import Answer, Call, Close, Command, Fatal, Returned, Tick, Ticked, Withdraw

DEFAULT_RUNNER = "steploom.worker.runner:Runner.load"


class RunnerLike(Protocol):
    """What a worker needs of a :class:`steploom.worker.runner.Runner`. One thread makes and uses it."""

    info: PipelineInfo

    def execute(self, output: SchedulerOutput) -> RunnerOutput:
        """One tick."""
        ...

    def call(self, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """A collective RPC."""
        ...

    def close(self) -> None:
        """Unwinds all programs."""
        ...


RunnerFactory = Callable[[EngineConfig, Callable[[str], None]], RunnerLike]
"""Makes a runner; it may report lines of progress, also later, from within a tick that warms up."""


def runner_factory(name: str) -> RunnerFactory:
    """The factory called ``"pkg.module:name"``.

    Raises:
        ConfigError: There is none.
    """
    module, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"runner={name!r}: must be 'pkg.module:name' ({error})") from None
    return found


class Inbox:
    """Commands that have arrived and wait for the device: calls before ticks, so that no call waits for two ticks."""

    def __init__(self) -> None:
        self._calls: deque[Call] = deque()
        self._ticks: deque[Tick] = deque()
        self._close: Close | None = None

    def put(self, command: Command) -> None:
        """Takes a command that has arrived.

        Raises:
            ProtocolError: It does not belong here.
        """
        if isinstance(command, Tick):
            self._ticks.append(command)
        elif isinstance(command, Call):
            self._calls.append(command)
        elif isinstance(command, Withdraw):
            self._calls = deque(call for call in self._calls if call.call != command.call)
        elif isinstance(command, Close):
            self._close = command
        else:
            raise ProtocolError(f"a worker that serves cannot take {type(command).__name__}")

    @property
    def empty(self) -> bool:
        """Whether nothing waits."""
        return not (self._close or self._calls or self._ticks)

    def next(self) -> Tick | Call | Close:
        """The command to obey now; :attr:`empty` must be false."""
        if self._close is not None:
            return self._close
        return self._calls.popleft() if self._calls else self._ticks.popleft()


def obey(runner: RunnerLike, command: Tick | Call) -> Ticked | Returned:
    """Executes one command. A failure is part of the answer: the worker lives on."""
    try:
        if isinstance(command, Tick):
            return Ticked(command.output.tick, runner.execute(command.output))
        return Returned(command.call, runner.call(command.method, command.args, command.kwargs))
    except Exception as error:  # noqa: BLE001 - the tick boundary: the engine hears of it
        return refusal(command, error)


def refusal(command: Tick | Call, error: Exception) -> Ticked | Returned:
    """The answer to a command that failed with ``error``."""
    info = describe(error)
    if isinstance(command, Tick):
        return Ticked(command.output.tick, error=info)
    return Returned(command.call, error=info)


def describe(error: BaseException) -> ErrorInfo:
    """``error`` as text, with its traceback."""
    return ErrorInfo.of(error, "".join(traceback.format_exception(error)))


def fatal(error: BaseException) -> Answer:
    """The last words of a worker."""
    return Fatal(describe(error))
