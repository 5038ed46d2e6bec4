"""outlast: waiting for an end that has to come, whoever cancels."""

from __future__ import annotations

import asyncio

import anyio


async def outlast(event: anyio.Event) -> None:
    """Waits for ``event`` whatever happens; a cancellation meanwhile is raised afterwards, as task groups do."""
    cancelled: asyncio.CancelledError | None = None
    with anyio.CancelScope(shield=True):  # Cancel scopes of anyio wait outside; a bare Task.cancel() does not.
        while not event.is_set():
            try:
                await event.wait()
            except asyncio.CancelledError as error:
                cancelled = error
    if cancelled is not None:
        raise cancelled
