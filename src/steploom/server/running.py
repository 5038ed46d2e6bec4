"""Running: what a server is doing, request by request."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator
from typing import Any

import anyio

from steploom import DiffusionOutput, DiffusionRequest, Queued, Restarted, StepEvent
from steploom.requests import Event


class Entry:
    """One request of the engine, as ``/v1/requests`` shows it."""

    def __init__(self, request: DiffusionRequest) -> None:
        self.request = request
        self.created = time.time()
        self.state = "queued"
        self.position: int | None = None
        self.step = 0
        self.total_steps: int | None = None
        self.batch_requests = 0.0
        self.attempt = 0

    def see(self, event: Event) -> None:
        """Takes in an event of the request."""
        match event:
            case Queued(position=position):
                self.position = position
            case StepEvent(step=step, total_steps=total, batch_requests=mates):
                self.state, self.position = "running", None
                self.step, self.total_steps, self.batch_requests = step, total, mates
            case Restarted(attempt=attempt):
                self.state, self.step, self.attempt = "queued", 0, attempt
            case _:
                pass

    def done(self, output: DiffusionOutput) -> None:
        """Takes in the outcome."""
        self.state = "completed"

    def shown(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "id": self.request.request_id, "object": "request", "created": int(self.created), "status": self.state,
            "queue_position": self.position, "step": self.step, "num_inference_steps": self.total_steps,
            "batch_requests": self.batch_requests, "seed": self.request.seed, "priority": self.request.priority,
            "user": self.request.user, "attempt": self.attempt, "age_s": round(time.time() - self.created, 3),
        }  # fmt: skip


class Running:
    """The requests that wait or run. Bounded by the engine's own queue, and by bodies that are being read."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._emptied = anyio.Event()

    @contextlib.contextmanager
    def entered(self, request: DiffusionRequest) -> Generator[Entry]:
        """The request is listed meanwhile."""
        entry = self._entries[request.request_id] = Entry(request)
        try:
            yield entry
        finally:
            del self._entries[request.request_id]
            if not self._entries:
                self._emptied.set()
                self._emptied = anyio.Event()

    async def emptied(self) -> None:
        """Returns when nothing waits or runs."""
        while self._entries:
            await self._emptied.wait()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._entries

    def find(self, request_id: str) -> dict[str, Any] | None:
        """One of them as JSON."""
        entry = self._entries.get(request_id)
        return entry.shown() if entry is not None else None

    def shown(self) -> list[dict[str, Any]]:
        """All of them as JSON, oldest first."""
        return [entry.shown() for entry in self._entries.values()]
