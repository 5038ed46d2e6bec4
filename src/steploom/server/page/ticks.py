"""TickFeed: what the engine does, tick by tick, for whoever draws a picture of the batch.

Ids, counts and phases only: no prompt, no user, no picture. The newest entries are kept, and each reader reads them at
its own speed; one that is too slow misses the oldest. So a reader costs the tick nothing.
"""

from __future__ import annotations

import json
import secrets
from collections import OrderedDict, deque
from itertools import islice
from typing import Any

import anyio

from steploom import DiffusionOutput, DiffusionRequest, EngineObserver, SteploomError
from steploom.errors import DeadlineExceeded, RequestCancelled
from steploom.protocol import RequestReport, RunnerOutput, SchedulerOutput, request_id_of

HISTORY = 600
"""Entries that are kept."""

LONGEST_NAME = 80
"""Characters of a batch key that are told, at most: it names a module and shapes."""


class TickFeed(EngineObserver):
    """The newest ticks of an engine, and who came and went between them.

    Entries are ``queued`` (a request waits), ``tick`` (who was scheduled, at which step each stands now, with how many
    it shared its forwards) and ``ended`` (how). A request's ``number`` counts the requests of this feed: everybody who
    watches tells them apart by the same number.

    Attributes:
        name: Of this feed; another process, or another life of this one, has another.
        closed: Whether nothing more will come.
    """

    def __init__(self) -> None:
        self.name = secrets.token_hex(6)
        self.closed = False
        self._entries: deque[_Entry] = deque(maxlen=HISTORY)
        self._count = 0
        self._numbers: dict[str, int] = {}
        self._numbered = 0
        self._waiting: OrderedDict[str, None] = OrderedDict()
        self._changed = anyio.Event()

    def on_queued(self, request: DiffusionRequest) -> None:
        """A lane begins."""
        self._waiting[request.request_id] = None
        self._numbered += 1
        self._numbers[request.request_id] = self._numbered
        self._add("queued", {"id": request.request_id, "number": self._numbered, "waiting": len(self._waiting)})

    def on_tick(self, output: SchedulerOutput, result: RunnerOutput, began: float, ended: float) -> None:
        """A column. Takes numbers and names out of the reports, and holds nothing else of them."""
        joined = {new.run_id for new in output.scheduled_new_reqs}
        for run in joined:
            self._waiting.pop(request_id_of(run), None)
        groups: dict[str, int] = {}
        cells = [
            self._cell(report, groups, report.run_id in joined)
            for report in result.reports
            if request_id_of(report.run_id) in self._numbers  # else it was cancelled while the tick ran
        ]
        tick = {"tick": output.tick, "seconds": round(ended - began, 4), "waiting": len(self._waiting)}
        self._add("tick", {**tick, "groups": [name[:LONGEST_NAME] for name in groups], "requests": cells})

    def on_end(self, request_id: str, output: DiffusionOutput | None, error: SteploomError | None) -> None:
        """A lane ends."""
        self._waiting.pop(request_id, None)
        number = self._numbers.pop(request_id, None)
        if number is not None:
            self._add("ended", {"id": request_id, "number": number, "outcome": _outcome(error)})

    def _cell(self, report: RequestReport, groups: dict[str, int], joined: bool) -> dict[str, Any]:
        key, request_id = report.batch_key, request_id_of(report.run_id)
        group = None if key is None or not report.batch_requests else groups.setdefault(key, len(groups))
        return {
            "id": request_id, "number": self._numbers[request_id], "step": report.step, "total": report.total_steps,
            "phase": report.phase, "stepped": report.stepped, "joined": joined, "group": group,
            "batch_requests": round(report.batch_requests, 2), "rows": report.rows,
        }  # fmt: skip

    def _add(self, kind: str, data: dict[str, Any]) -> None:
        self._count += 1
        self._entries.append(_Entry(self._count, kind, data))
        self.notify()

    def notify(self) -> None:
        """Wakes all that wait for a change."""
        self._changed.set()
        self._changed = anyio.Event()

    async def changed(self) -> None:
        """Returns when there is a new entry, or the feed was closed."""
        await self._changed.wait()

    def close(self) -> None:
        """Nothing more will come: the server is being shut down."""
        self.closed = True
        self.notify()

    def read(self, after: int, most: int) -> tuple[bytes, int]:
        """The entries after the one of number ``after`` as server-sent events, at most so many.

        Returns:
            The events, empty if there is none, and the number of the last of them.
        """
        first = self._count - len(self._entries)
        skipped = max(0, after - first)
        found = list(islice(self._entries, skipped, skipped + most))
        return b"".join(entry.text() for entry in found), found[-1].number if found else after

    @property
    def count(self) -> int:
        """The number of the newest entry."""
        return self._count


class _Entry:
    """One entry, which becomes text when somebody reads it for the first time."""

    __slots__ = ("_data", "_kind", "_text", "number")

    def __init__(self, number: int, kind: str, data: dict[str, Any]) -> None:
        self.number, self._kind = number, kind
        self._data: dict[str, Any] | None = data
        self._text = b""

    def text(self) -> bytes:
        if self._data is not None:
            data = json.dumps(self._data, separators=(",", ":"))
            self._text = f"id: {self.number}\nevent: {self._kind}\ndata: {data}\n\n".encode()
            self._data = None
        return self._text


def _outcome(error: SteploomError | None) -> str:
    match error:
        case None:
            return "completed"
        case DeadlineExceeded():
            return "timeout"
        case RequestCancelled():
            return "cancelled"
        case _:
            return "failed"
