"""For web applications of your own: work that ends when its client hangs up.

::

    from steploom.web import cancel_on_disconnect

    @app.post("/draw")
    async def draw(request: Request, prompt: str):
        out = await cancel_on_disconnect(request, engine.generate(prompt))

``request`` is that of any ASGI framework (Starlette, FastAPI, Litestar, Quart), or its bare ``receive``. aiohttp needs
no help: ``web.run_app(app, handler_cancellation=True)`` cancels a handler whose client is gone.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeVar, cast

import anyio

from steploom.errors import RequestCancelled

T = TypeVar("T")
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class ClientDisconnected(RequestCancelled):
    """The client hung up before its answer was there; there is nobody to tell."""


async def cancel_on_disconnect(request: Any, work: Awaitable[T]) -> T:
    """The result of ``work``, which is cancelled if the client hangs up first.

    Args:
        request: An ASGI framework's request, whose body was read; or the ``receive`` of an ASGI application.
        work: What the client waits for: ``engine.generate(...)``.

    Raises:
        ClientDisconnected: The client is gone; ``work`` was cancelled, and has ended.
        Exception: Whatever ``work`` raises, as it is.
    """
    receive: Receive = _receive_of(request)
    results: list[T] = []
    faults: list[Exception] = []

    async with anyio.create_task_group() as group:
        group.start_soon(watch_disconnect, receive, group.cancel_scope.cancel)
        try:
            results.append(await work)
        except Exception as fault:  # noqa: BLE001 - raised below, outside of the group, which would wrap it
            faults.append(fault)
        group.cancel_scope.cancel()
    for fault in faults:
        raise fault
    if not results:
        raise ClientDisconnected("the client hung up")
    return results[0]


async def watch_disconnect(receive: Receive, gone: Callable[[], object]) -> None:
    """Calls ``gone`` when the client hangs up; reads, and drops, what is left of the request's body until then."""
    while (await receive())["type"] != "http.disconnect":
        pass
    gone()


def _receive_of(request: Any) -> Receive:
    receive = getattr(request, "receive", None) or getattr(request, "_receive", request)
    if not callable(receive):
        raise TypeError(f"request={type(request).__name__}: has no receive(); give an ASGI request or its receive")
    return cast("Receive", receive)
