"""LiveRequests: those that an engine has accepted and that have no outcome yet."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator

from steploom.engine.checks.generators import Borrowed
from steploom.engine.mailbox import Mailbox
from steploom.requests import DiffusionRequest


class LiveRequests(dict[str, Mailbox]):
    """Their mailboxes by id, oldest first; with each its generators, and the clock of its ``timeout``.

    Args:
        expire: Is told when a request's ``timeout`` has passed.
        emptied: Is told when the last one has gone.

    Attributes:
        borrowed: Requests and generators by id.
        timers: What ends them, of those that have a ``timeout``; anyio would need a task for each.
    """

    def __init__(self, expire: Callable[[DiffusionRequest], None], emptied: Callable[[], None]) -> None:
        super().__init__()
        self.borrowed: dict[str, Borrowed] = {}
        self.timers: dict[str, asyncio.TimerHandle] = {}
        self._expire = expire
        self._emptied = emptied

    def enter(self, borrowed: Borrowed, mailbox: Mailbox, left_s: float | None) -> None:
        """Adds a request that is to expire after so many seconds, if any."""
        request = borrowed.request
        self[request.request_id], self.borrowed[request.request_id] = mailbox, borrowed
        if left_s is not None:
            loop = asyncio.get_running_loop()
            self.timers[request.request_id] = loop.call_later(left_s, self._expire, request)

    def leave(self, request_id: str) -> None:
        """Removes one."""
        del self[request_id], self.borrowed[request_id]
        timer = self.timers.pop(request_id, None)
        if timer is not None:
            timer.cancel()
        if not self:
            self._emptied()

    def take(self, request_ids: Iterable[str]) -> Iterator[tuple[Borrowed, Mailbox, float | None]]:
        """Removes these, as :meth:`enter` takes them."""
        for request_id in request_ids:
            borrowed, mailbox, timer = self.borrowed[request_id], self[request_id], self.timers.get(request_id)
            left_s = None if timer is None else max(0.0, timer.when() - asyncio.get_running_loop().time())
            self.leave(request_id)
            yield borrowed, mailbox, left_s
