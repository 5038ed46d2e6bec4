"""Mailbox: where the events of one request wait for their reader, bounded by what it keeps and not by who reads."""

from __future__ import annotations

from collections import deque
from typing import TypeVar

import anyio

from steploom.errors import SteploomError
from steploom.requests import Commit, DiffusionOutput, Draft, Event, Failed, Finished, Restarted, StepEvent

_OF_ONE_ATTEMPT = (StepEvent, Draft, Commit, Restarted)

E = TypeVar("E", bound=SteploomError)


class Mailbox:
    """The events of one request, for one reader.

    :meth:`put` never waits, so no reader can stall the engine; and whatever the reader does, at most eight events are
    kept. A reader that is slower than the steps sees the latest one only (progress *conflates*), with one exception:
    latents and previews were asked for and paid for, so the newest event with latents and the newest one with a
    preview stay, each as it was, in order of their steps. Of text, commits are joined, and the newest draft stays if no
    commit has followed it. The outcome is never dropped.
    """

    def __init__(self) -> None:
        self._unread: deque[Event] = deque()
        self._changed: anyio.Event | None = None
        self._settled = anyio.Event()
        self._output: DiffusionOutput | None = None
        self._error: SteploomError | None = None

    def __len__(self) -> int:
        """Unread events."""
        return len(self._unread)

    @property
    def settled(self) -> bool:
        """Whether the outcome is there; whatever is put later is ignored."""
        return self._output is not None or self._error is not None

    def put(self, event: Event) -> None:
        """Adds ``event`` and drops the unread ones that it makes superfluous."""
        if self.settled:
            return
        unread = self._unread
        if type(event) is StepEvent:
            if unread and _says_less(unread[-1]):  # in every step of every request that nobody follows
                unread[-1] = event
            else:
                unread.append(event)
                self._unread = _conflated(unread)
        elif isinstance(event, Failed):
            self.fail(event.error)
            return
        else:
            self._unread = _with(event, unread)
            if isinstance(event, Finished):
                self._output = event.output
                self._settled.set()
        self._tell()

    def _tell(self) -> None:
        if self._changed is not None:
            self._changed.set()

    def fail(self, error: SteploomError) -> None:
        """Ends the request with ``error``, which its reader meets after what it has not read yet."""
        if self.settled:
            return
        self._error = error
        self._settled.set()
        self._tell()

    async def next(self) -> Event | None:
        """The oldest unread event, waiting for one; None after :class:`~steploom.requests.Finished`.

        Raises:
            SteploomError: The outcome, if the request has no output.
        """
        while not self._unread and not self.settled:
            self._changed = anyio.Event()
            try:
                await self._changed.wait()
            finally:
                self._changed = None
        if self._unread:
            return self._unread.popleft()
        self._raise_error()
        return None

    async def outcome(self) -> DiffusionOutput:
        """The output, waiting for it; unread progress is left alone.

        Raises:
            SteploomError: The outcome, if the request has no output.
        """
        if not self.settled:
            await self._settled.wait()
        self._raise_error()
        assert self._output is not None
        return self._output

    def _raise_error(self) -> None:
        if self._error is not None:
            raise fresh(self._error)


def fresh(error: E) -> E:
    """A copy of ``error`` to raise: one object raised by several tasks would mix up their tracebacks."""
    copy = type(error).__new__(type(error), *error.args)
    copy.__dict__.update(error.__dict__)
    copy.__cause__ = error.__cause__
    return copy


def _says_less(event: Event) -> bool:
    """Whether ``event`` is of a step that any later one makes superfluous."""
    return type(event) is StepEvent and event.latents is None and event.preview is None


def _with(event: Event, unread: deque[Event]) -> deque[Event]:
    """``unread`` and ``event``, which is no step, without those that it makes superfluous."""
    if isinstance(event, Restarted):  # The steps of the lost attempt mean nothing any more.
        unread = deque(old for old in unread if not isinstance(old, _OF_ONE_ATTEMPT))
    if isinstance(event, Draft | Commit):
        unread = deque(old for old in unread if not isinstance(old, Draft))
    last = next((old for old in unread if isinstance(old, Commit)), None)
    if isinstance(event, Commit) and last is not None:
        unread[unread.index(last)] = last.followed_by(event)
    else:
        unread.append(event)
    return unread


def _conflated(events: deque[Event]) -> deque[Event]:
    """Of the step events only the newest one, the newest one with latents, and the newest one with a preview."""
    kept: deque[Event] = deque()
    seen: set[str] = set()
    for event in reversed(events):
        if isinstance(event, StepEvent):
            news = {"step"}
            if event.latents is not None:
                news.add("latents")
            if event.preview is not None:
                news.add("preview")
            if news <= seen:
                continue
            seen |= news
        kept.appendleft(event)
    return kept
