"""RequestStream: the handle of one request while it runs."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self

from steploom.engine.checks.buffers import kept
from steploom.engine.checks.pictures import load_pictures
from steploom.engine.core import EngineCore
from steploom.engine.mailbox import Mailbox
from steploom.requests import DiffusionOutput, DiffusionRequest, Event


class RequestStream:
    """One running request: an async context manager, and an async iterator of its events.

    ::

        async with engine.stream("a red circle", preview_every=4) as run:
            async for event in run:      # Queued | StepEvent | Draft | Commit | Restarted | Finished
                ...
            out = await run.result()

    Entering submits the request; leaving early aborts it, and its slot is free by the next step. There is one reader of
    events: progress that it does not fetch in time conflates (:class:`~steploom.engine.mailbox.Mailbox`).

    Made by :meth:`steploom.AsyncDiffusionEngine.stream`.
    """

    def __init__(self, request: DiffusionRequest, serving: Callable[[], EngineCore]) -> None:
        self._request = request
        self._serving = serving
        self._core: EngineCore | None = None
        self._mailbox: Mailbox | None = None

    @property
    def request_id(self) -> str:
        """The request's id, as :meth:`~steploom.AsyncDiffusionEngine.abort` takes it."""
        return self._request.request_id

    async def __aenter__(self) -> Self:
        """Submits the request, at once or not at all; pictures in files or bytes are read first, in a thread.

        Raises:
            InvalidRequest: The request does not fit the pipeline or the limits.
            QueueFull: No place in the waiting queue.
            EngineError: The engine cannot serve.
        """
        if self._mailbox is not None:
            raise RuntimeError(f"the stream of request {self.request_id} was entered before: make a new one")
        core = self._serving()
        with core.refusals(self._request):
            assert core.info is not None
            self._request = core.info.in_own_words(self._request)
            info = core.check(self._request)
            request = await load_pictures(self._request, info, core.config.max_pixels)
            checked = request is self._request
            if not info.in_process:  # where it is read again whenever it begins, by workers
                request = await kept(request)
        self._core = self._serving()
        checked = checked and self._core is core  # else there are other arguments now, or another model
        self._mailbox = self._core.submit(request, info if checked else None)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._core is not None and self._mailbox is not None:
            for core in self._core.operations.cores:  # a model that was replaced may hold it yet, or its successor
                core.withdraw(self.request_id, self._mailbox)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        event = await self._entered().next()
        if event is None:
            raise StopAsyncIteration
        return event

    async def result(self) -> DiffusionOutput:
        """The request's output, waiting for it; the events need not have been read.

        Raises:
            DeadlineExceeded: ``timeout`` passed.
            RequestCancelled: Aborted, by ``engine.abort``, by closing the engine, or by leaving the stream.
            GenerationFailed: The pipeline raised.
            EngineError: The engine cannot serve any more.
        """
        return await self._entered().outcome()

    def _entered(self) -> Mailbox:
        if self._mailbox is None:
            raise RuntimeError("enter the stream first: `async with engine.stream(...) as run`")
        return self._mailbox
