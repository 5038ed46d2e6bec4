"""What an executor and one worker say to each other, around the structs of :mod:`steploom.protocol`.

A worker process says :class:`Hello`, is told its :class:`Configure`, reports :class:`Progress` while it loads and
:class:`Ready` when it has. From then on it answers each :class:`Tick` with :class:`Ticked` and each :class:`Call` with
:class:`Returned`, until it is told to :class:`Close`. What is to be added to a tick comes as :class:`Amend`. A worker
that cannot go on says why with :class:`Fatal`.
A worker thread of the in-process executor takes and gives the same messages as objects.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec

from steploom import codec
from steploom.config import EngineConfig
from steploom.protocol import PROTOCOL_VERSION, ErrorInfo, PipelineInfo, RunnerOutput, SchedulerOutput
from steploom.worker.portable import travelling


class Hello(msgspec.Struct, frozen=True, tag=True):
    """The worker's first message, before it has imported anything heavy. Its form never changes."""

    version: int = PROTOCOL_VERSION


class Configure(msgspec.Struct, frozen=True, tag=True):
    """The engine's first message: the fields of its :class:`~steploom.config.EngineConfig`."""

    config: dict[str, Any]

    @classmethod
    def of(cls, config: EngineConfig, rank: int = 0) -> Configure:
        """``config`` as a message to worker ``rank``, whose device (or the first of its ranks') is the one of that
        number unless one is named.

        Classes (they stay with the engine) are replaced by their names.

        Raises:
            ConfigError: A setting holds what cannot travel.
        """
        fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        if rank and config.device in ("auto", "cuda"):
            fields["device"] = f"{config.device}:{rank * config.ranks}"
        for name in ("quantization_config", "group_offload", "components", "dtype", "compile"):
            if not isinstance(fields[name], str | bool | None):
                fields[name] = travelling(name, fields[name])
        return cls({name: value.__qualname__ if isinstance(value, type) else value for name, value in fields.items()})

    def restore(self) -> EngineConfig:
        """The configuration.

        Raises:
            ConfigError: A value is out of range.
            TypeError: A field is unknown.
        """
        return EngineConfig(**self.config)


class Tick(msgspec.Struct, frozen=True, tag=True):
    """Execute one tick."""

    output: SchedulerOutput


class Amend(msgspec.Struct, frozen=True, tag=True):
    """Add this to the tick of that number, which was sent before; if it has begun, to what comes next."""

    output: SchedulerOutput


class Call(msgspec.Struct, frozen=True, tag=True):
    """Call a method of the runner between two ticks."""

    call: int
    method: str
    args: list[Any]
    kwargs: dict[str, Any]


class Withdraw(msgspec.Struct, frozen=True, tag=True):
    """Nobody waits for this call any more: do not begin it."""

    call: int


class Close(msgspec.Struct, frozen=True, tag=True):
    """Unwind all programs and end."""


class Progress(msgspec.Struct, frozen=True, tag=True):
    """A line about loading. In a tick: the worker warms up, so the tick's clock stops."""

    line: str


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The model is loaded; dataclasses of ``packages`` may travel from now on."""

    info: PipelineInfo
    packages: list[str] = []


class Ticked(msgspec.Struct, frozen=True, tag=True):
    """The answer to a tick; ``error`` is set if the runner itself failed."""

    tick: int
    output: RunnerOutput | None = None
    error: ErrorInfo | None = None


class Returned(msgspec.Struct, frozen=True, tag=True):
    """The answer to a call."""

    call: int
    result: Any = None
    error: ErrorInfo | None = None


class Fatal(msgspec.Struct, frozen=True, tag=True):
    """The worker ends, and why."""

    error: ErrorInfo


Command = Configure | Tick | Amend | Call | Withdraw | Close
"""What a worker is told."""
Answer = Hello | Progress | Ready | Ticked | Returned | Fatal
"""What a worker says."""


Written = list[codec.Buffer]
"""A message as it travels."""


class ToWorker(msgspec.Struct, frozen=True):
    """A command on the wire. (msgspec remembers how to decode a struct; a bare union it would study each time.)"""

    command: Command


class ToEngine(msgspec.Struct, frozen=True):
    """An answer on the wire."""

    answer: Answer
