"""What a storm does to the messages of a worker, and to its end."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

from storm_model import taken

from steploom import codec
from steploom.executor.process import WorkerProcess
from steploom.executor.transport import WorkerSocket
from steploom.protocol import request_id_of
from steploom.worker.messages import Amend, Command, Tick, Ticked, ToWorker

if TYPE_CHECKING:
    from storm import Storm

LATE_S = 0.3
"""How long a message is held back."""
AGAIN = "again"
"""The id of a request that is given up, and asked for anew, while the answer that ends it is on its way."""


class Stormy(WorkerSocket):
    """The engine's end of a socket whose messages come late, or cut off."""

    storm: Storm
    _held: list[Command] | None = None
    _kept: Ticked | None = None

    def send(self, command: Command) -> None:
        new = command.output.scheduled_new_reqs if isinstance(command, Tick | Amend) else []
        if self._kept is not None and any(one.request.request_id == AGAIN for one in new):
            self._loop.call_soon(self._give, AGAIN)
        if self._held is not None:
            self._held.append(command)
        elif isinstance(command, Tick) and taken("late command"):
            self._held = [command]
            self._loop.call_later(LATE_S, self._send_late)
        elif isinstance(command, Tick) and taken("cut command"):
            header, *rest = codec.encode(ToWorker(command), packages=self.packages)
            self._socket.send_multipart([header[: len(header) // 2], *rest])
        else:
            super().send(command)

    def _send_late(self) -> None:
        held, self._held = self._held or [], None
        if not self._socket.closed:
            for command in held:
                super().send(command)
            self.storm.note("late command")

    def _decode(self, buffers: list[memoryview]) -> Any:
        if taken("cut answer"):
            buffers = [buffers[0][: len(buffers[0]) // 2], *buffers[1:]]
        return super()._decode(buffers)

    def _deliver(self, answer: Any) -> None:
        given_up = self._on_answer.__self__.failure is not None
        if given_up and isinstance(answer, Ticked):
            super()._deliver(answer)
            self.storm.note("stale answer")
        elif isinstance(answer, Ticked) and _ends(answer) and taken(AGAIN):
            self._decoding, self._kept = True, answer
            self.storm.kept.set()
            self.storm.note("kept")
            self._loop.call_later(LATE_S, self._give, "too late")
        elif isinstance(answer, Ticked) and taken("late answer"):
            self._decoding = True  # what comes after it waits, as behind any other that takes its time
            self._loop.call_later(LATE_S, self._deliver_late, answer)
        else:
            super()._deliver(answer)

    def _give(self, what: str) -> None:
        kept, self._kept = self._kept, None
        if kept is not None:
            self._decoding = False
            super()._deliver(kept)
            self.storm.note(what)
            self._drain()

    def _deliver_late(self, answer: Any) -> None:
        self._decoding = False
        if not self._socket.closed:
            super()._deliver(answer)
            self.storm.note("late answer")
            self._drain()


def _ends(answer: Ticked) -> bool:
    """Whether it has the outcome of the request of that id."""
    reports = answer.output.reports if answer.output is not None else []
    return any(report.finished and request_id_of(report.run_id) == AGAIN for report in reports)


class Undead(WorkerProcess):
    """A process that was given up while it stood still, and goes on: it answers before it can be ended."""

    storm: Storm
    _revived = False

    def kill(self) -> None:
        if self.storm.now == "revive" and not self._revived:
            self._revived = True
            self._stale = self.storm.seen["stale answer"]
            self._signal(signal.SIGCONT)
        else:
            super().kill()

    async def end(self, grace_s: float) -> None:
        if self._revived:
            await self.storm.until(lambda: self.storm.seen["stale answer"] > self._stale)
        await super().end(grace_s)
