"""Generation: what one HTTP request asks for, as requests of the engine, and the log of what became of them.

Whoever runs it fills the log; whoever answers a client reads it, from its beginning, at the client's own speed. So a
request that is sent again with the same ``Idempotency-Key`` reads the log of the first one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import anyio
from anyio.abc import TaskGroup

from steploom import (
    AsyncDiffusionEngine,
    DiffusionRequest,
    EngineError,
    InvalidRequest,
    QueueFull,
    RequestCancelled,
    SteploomError,
)
from steploom.server.errors import ApiError
from steploom.server.running import Running

log = logging.getLogger(__name__)


class Generation:
    """What one HTTP request asks for. A subclass says how one request of the engine fills the log.

    Args:
        requests: Requests of the engine, which run at once.
        stream: Whether the client wants events as they come.

    Attributes:
        log: What has happened so far, in order. Entries are the subclass', and bounded by what was asked for; None
            stands where one was that later ones have replaced.
        created: Unix time.
        error: Why it failed.
        abandoned: Whether it was given up, since nobody waited any more.
        watchers: Clients that wait for it.
    """

    def __init__(self, requests: Sequence[DiffusionRequest], *, stream: bool) -> None:
        self.requests = requests
        self.stream = stream
        self.log: list[Any] = []
        self.created = int(time.time())
        self.error: Exception | None = None
        self.abandoned = False
        self.watchers = 0
        self._accepted = 0
        self._ended = False
        self._changed = anyio.Event()

    @property
    def ended(self) -> bool:
        """Whether the log grows no more."""
        return self._ended

    @property
    def accepted(self) -> bool:
        """Whether the engine has accepted every one of its requests, so that a stream may begin."""
        return self._accepted == len(self.requests)

    @property
    def weight(self) -> int:
        """Bytes of the files in the log."""
        return 0

    async def changed(self) -> None:
        """Returns when the log has grown, has ended, or a watcher came or went."""
        await self._changed.wait()

    def notify(self) -> None:
        """Wakes all that wait for a change."""
        self._changed.set()
        self._changed = anyio.Event()

    async def run(self, engine: AsyncDiffusionEngine, running: Running) -> None:
        """Makes it all, at once. The first request that fails ends the others; why is kept in ``error``."""
        whole = False
        try:
            async with anyio.create_task_group() as group:
                for index, request in enumerate(self.requests):
                    group.start_soon(self._guarded, engine, running, index, request, group)
            whole = True
        finally:
            if not whole:
                self.abandon()
            self._ended = True
            self.notify()

    def abandon(self) -> None:
        """Says that what is not made yet never will be: who asks again begins anew."""
        if not self._ended:
            self.abandoned = True
            self._fail(ApiError(499, "the request was given up: its client had hung up", code="request_cancelled"))

    async def _guarded(
        self, engine: AsyncDiffusionEngine, running: Running, index: int, request: DiffusionRequest, group: TaskGroup
    ) -> None:
        try:
            await self._one(engine, running, index, request, group)
        except InvalidRequest as error:
            self._fail(ApiError(error.status, str(error), param=self._param_of(error), code="invalid_value"))
            group.cancel_scope.cancel()
        except RequestCancelled as error:
            self._fail(_why_cancelled(engine, error))
            group.cancel_scope.cancel()
        except QueueFull as error:
            self._fail(_why_full(engine, error, len(self.requests)))
            group.cancel_scope.cancel()
        except (SteploomError, ApiError) as error:
            self._fail(error)
            group.cancel_scope.cancel()
        except Exception as error:  # whoever waits is told that it failed, and nothing more
            log.exception("request %s failed", request.request_id)
            self._fail(error)
            group.cancel_scope.cancel()

    def _fail(self, error: Exception) -> None:
        if self.error is None:
            self.error = error.with_traceback(None)

    async def _one(
        self, engine: AsyncDiffusionEngine, running: Running, index: int, request: DiffusionRequest, group: TaskGroup
    ) -> None:
        """Runs one of the requests; calls :meth:`_accept` once the engine has it, and :meth:`_add`."""
        raise NotImplementedError

    def _param_of(self, error: InvalidRequest) -> str | None:
        """What the client called the field that the engine refused."""
        return error.field

    def _accept(self) -> None:
        self._accepted += 1
        self.notify()

    def _add(self, entry: Any) -> None:
        self.log.append(entry)
        self.notify()


def _why_cancelled(engine: AsyncDiffusionEngine, error: RequestCancelled) -> Exception:
    """A closed engine has cancelled everything: another server, or this one later, may do what was asked.

    So may it be after a drain.
    """
    if error.drained:
        return ApiError(503, "the request was not done when the server was drained", code="draining")
    try:
        engine.check_serving()
    except EngineError:
        return ApiError(503, "the server was shut down before the request was done", code="draining")
    return error


def _why_full(engine: AsyncDiffusionEngine, error: QueueFull, asked: int) -> Exception:
    """More than the queue can hold never fit: whoever asks for that is not to ask again."""
    most = engine.config.max_waiting
    if asked <= most:
        return error
    why = f"n: {asked} requests at once, the queue has {most} places; ask for fewer, or start the server with more"
    return ApiError(429, why, param="n", code="queue_full", headers={"X-Should-Retry": "false"})
