"""What a worker does with the messages that it takes, whether it is a process or a thread."""

from __future__ import annotations

import importlib
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from steploom.config import EngineConfig
from steploom.errors import ConfigError, ProtocolError
from steploom.protocol import ErrorInfo, PipelineInfo, RunnerOutput, SchedulerOutput, WorkerStats
from steploom.worker.agenda import Agenda
from steploom.worker.gaps import Gaps
from steploom.worker.messages import Amend, Answer, Call, Close, Command, Fatal, Returned, Tick, Ticked, Withdraw

DEFAULT_RUNNER = "steploom.worker.runner:Runner.load"


class RunnerLike(Protocol):
    """What a worker needs of a :class:`steploom.worker.runner.Runner`. One thread makes and uses it."""

    @property
    def info(self) -> PipelineInfo:
        """What the pipeline accepts."""
        ...

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
    """Commands that have arrived and wait for the device: calls before ticks, so that no call waits for two ticks.

    Args:
        agenda: Is told of amendments.
    """

    def __init__(self, agenda: Agenda) -> None:
        self._agenda = agenda
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
        elif isinstance(command, Amend):
            self._agenda.amend(command.output)
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
        return not (self._close or self._calls or self._ticks or self._agenda.ended)

    def next(self) -> Begun | Call | Forget | Close:
        """The command to obey now; :attr:`empty` must be false."""
        if self._close is not None:
            return self._close
        if self._calls:
            return self._calls.popleft()
        if self._ticks:
            return Begun(*self._agenda.begin(self._ticks.popleft().output))
        return Forget(self._agenda.forget())


class Begun(NamedTuple):
    """A tick that begins now, and how many amendments are in it."""

    output: SchedulerOutput
    amended: int


class Forget(NamedTuple):
    """Programs ended, and no tick says so: this one, which nobody waits for."""

    output: SchedulerOutput


class Obedience:
    """Executes commands, one at a time.

    Args:
        runner: Does the work.
        agenda: Is told whom the runner holds.
        gaps: Is told when ticks begin and end.
    """

    def __init__(self, runner: RunnerLike, agenda: Agenda, gaps: Gaps) -> None:
        self._runner = runner
        self._agenda = agenda
        self._gaps = gaps

    def obey(self, command: Begun | Call | Forget) -> Ticked | Returned | None:
        """Executes one command; None if it has no answer. A failure is part of the answer: the worker lives on."""
        if isinstance(command, Forget):
            self._runner.execute(command.output)
            return None
        try:
            if isinstance(command, Begun):
                return Ticked(command.output.tick, self._tick(command))
            return Returned(command.call, self._call(command))
        except Exception as error:  # noqa: BLE001 - the tick boundary: the engine hears of it
            return refusal(command, error)

    def _tick(self, begun: Begun) -> RunnerOutput:
        gap_s, idle_s = self._gaps.begin()
        try:
            result = self._runner.execute(begun.output)
            self._agenda.end(begun.output, result, begun.amended)
        finally:
            self._gaps.end(self._agenda.busy)
        result.gap_s, result.idle_s = gap_s, idle_s
        return result

    def _call(self, call: Call) -> Any:
        started = time.perf_counter()
        try:
            result = self._runner.call(call.method, call.args, call.kwargs)
        finally:
            self._gaps.called(started)
        if isinstance(result, WorkerStats):
            result.gap_s, result.idle_s = self._gaps.gap_s, self._gaps.idle_s
        return result


def refusal(command: Begun | Call, error: Exception) -> Ticked | Returned:
    """The answer to a command that failed with ``error``."""
    info = describe(error)
    if isinstance(command, Begun):
        return Ticked(command.output.tick, error=info)
    return Returned(command.call, error=info)


def describe(error: BaseException) -> ErrorInfo:
    """``error`` as text, with its traceback."""
    return ErrorInfo.of(error, "".join(traceback.format_exception(error)))


def fatal(error: BaseException) -> Answer:
    """The last words of a worker."""
    return Fatal(describe(error))
