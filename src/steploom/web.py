"""For web applications of your own: work that ends when its client hangs up, streams, and errors as HTTP has them.

::

    from steploom.web import cancel_on_disconnect, http_error, png, sse

    @app.post("/draw")
    async def draw(request: Request, prompt: str):
        out = await cancel_on_disconnect(request, engine.generate(prompt))
        return Response(await png(out.images[0]), media_type="image/png")

Nothing here belongs to one framework: ``examples/`` has the same application in FastAPI, Starlette, Litestar, aiohttp
and Quart.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, MutableMapping
from typing import Any, TypeVar, cast

import anyio
from PIL import Image

from steploom.engine.stream import RequestStream
from steploom.errors import ConfigError, QueueFull, RequestCancelled, SteploomError
from steploom.requests import Commit, DiffusionOutput, Draft, Event, Finished, Queued, Restarted, StepEvent
from steploom.threads import SERVING

T = TypeVar("T")
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

SSE_HEADERS = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Headers of a response whose body is :func:`sse`: no proxy is to keep it back."""

_GONE = ("http.disconnect", "websocket.disconnect")
_CANCELS_BY_ITSELF = {"aiohttp", "quart"}
"""Frameworks that cancel a handler whose client has hung up."""
_RETRY_AFTER_S = 1


class ClientDisconnected(RequestCancelled):
    """The client hung up before its answer was there; there is nobody to tell."""


async def cancel_on_disconnect(request: Any, work: Awaitable[T]) -> T:
    """The result of ``work``, which is cancelled if the client hangs up first.

    Args:
        request: The request, or the websocket, of an ASGI framework (FastAPI, Starlette, Litestar), or the ``receive``
            of an ASGI application. Read its body before: what is left of it, and what a websocket's client sends
            meanwhile, is dropped. Quart and aiohttp (with ``handler_cancellation=True``) cancel a handler whose client
            is gone by themselves; theirs are taken too.
        work: What the client waits for: ``engine.generate(...)``.

    Raises:
        ClientDisconnected: The client is gone; ``work`` was cancelled, and has ended. (In Quart and aiohttp the handler
            is cancelled: ``CancelledError``.)
        ConfigError: The aiohttp server does not cancel handlers.
        TypeError: ``request`` is nothing of these.
        Exception: Whatever ``work`` raises, as it is.
    """
    try:
        receive = _receive_of(request)
    except Exception:
        if isinstance(work, Coroutine):
            work.close()  # pyright: ignore[reportUnknownMemberType] - it never begins
        raise
    if receive is None:
        return await work
    return await _unless_gone(receive, work)


async def _unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    results: list[T] = []
    faults: list[Exception] = []

    async def watch() -> None:
        try:
            await watch_disconnect(receive, group.cancel_scope.cancel)
        except Exception as fault:  # noqa: BLE001 - raised below, outside of the group, which would wrap it
            faults.append(fault)
            group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(watch)
        try:
            results.append(await work)
        except Exception as fault:  # noqa: BLE001 - likewise
            faults.append(fault)
        group.cancel_scope.cancel()
    if results:
        return results[0]
    for fault in faults:
        raise fault
    raise ClientDisconnected("the client hung up")


async def watch_disconnect(receive: Receive, gone: Callable[[], object]) -> None:
    """Calls ``gone`` when the client hangs up; reads, and drops, whatever it sends until then."""
    while (await receive())["type"] not in _GONE:
        pass
    gone()


def _receive_of(request: Any) -> Receive | None:
    """Where the news that the client is gone comes from; None if the framework cancels the handler.

    ``__class__`` and not ``type()``: Quart's ``request`` is a proxy, which even seems to be callable.
    """
    families = {cls.__module__.partition(".")[0] for cls in request.__class__.__mro__} & _CANCELS_BY_ITSELF
    if "aiohttp" in families and not _aiohttp_cancels(request):
        raise ConfigError(
            "handler_cancellation=False: aiohttp does not end a handler whose client is gone; "
            "give handler_cancellation=True to web.run_app, AppRunner or ServerRunner"
        )
    if families:
        return None
    receive = getattr(request, "receive", None) or getattr(request, "_receive", request)
    if not callable(receive):
        raise TypeError(f"request={type(request).__name__}: has no receive(); give an ASGI request or its receive")
    return cast("Receive", receive)


def _aiohttp_cancels(request: Any) -> bool:
    """Whether the server was told to; nothing public says so, and who cannot be asked is believed."""
    manager = getattr(getattr(request, "protocol", None), "_manager", None)
    return bool(getattr(manager, "handler_cancellation", True))


def http_error(error: Exception) -> tuple[dict[str, Any], int, dict[str, str]]:
    """What a response says of ``error``: its content as JSON, its status and its headers.

    ``JSONResponse(*http_error(error))`` in FastAPI and Starlette, ``return http_error(error)`` in Quart.

    Args:
        error: Any of steploom's, which knows its status; another ``ValueError``, as parsers of the client's fields
            raise them, is a 400; whatever else is a 500 of which the client is told nothing.

    Returns:
        Content ``{"error": {"type", "message", "field"}}``, status, headers (``Retry-After`` of a 429 and a 503).
    """
    ours = isinstance(error, SteploomError)
    status = error.status if ours else 400 if isinstance(error, ValueError) else 500
    message = str(error) if ours or status == 400 else "internal error"
    kind = type(error).__name__ if ours or status == 400 else "InternalError"
    headers: dict[str, str] = {}
    if status in (429, 503):
        after = error.retry_after_s if isinstance(error, QueueFull) else None
        headers["Retry-After"] = str(max(_RETRY_AFTER_S, math.ceil(after or 0)))
    return {"error": {"type": kind, "message": message, "field": getattr(error, "field", None)}}, status, headers


async def png(image: Image.Image) -> bytes:
    """``image`` as a PNG file, made in a thread."""
    return await SERVING.run(_png, image)


async def sse(run: RequestStream) -> AsyncGenerator[bytes]:
    """Submits the request of ``run`` at once, and returns its events as server-sent events.

    So whatever is wrong with the request is raised before the response begins, and can have a status of its own. The
    request is aborted when the generator is closed or cancelled before its end, as frameworks do when a client hangs
    up.

    Messages are named ``queued`` (``position``), ``step`` (``step``, ``total_steps``, ``preview``: a data URL or null),
    ``draft`` and ``commit`` (``text``), ``restarted`` (``attempt``), and at last ``finished`` (``seed``, ``steps``,
    ``images``: data URLs, ``text``) or ``failed`` (as :func:`http_error`, and its ``status``); their data is JSON. A
    client that is slower than the steps gets the latest one only. A browser's ``EventSource`` asks again when the
    stream has ended: ``close()`` it at ``finished`` and ``failed``.

    Args:
        run: ``engine.stream(...)``, which has not been entered.

    Raises:
        InvalidRequest: The request does not fit the pipeline or the limits.
        QueueFull: No place in the waiting queue.
        EngineError: The engine cannot serve.
    """
    messages = _messages(run)
    await anext(messages)
    return messages


async def _messages(run: RequestStream) -> AsyncGenerator[bytes]:
    async with run:
        yield b""  # it was submitted; one that is dropped from here on is closed by the event loop
        try:
            async for event in run:
                yield await _message(event)
        except SteploomError as error:
            content, status, _ = http_error(error)
            yield _line("failed", {**content, "status": status})


async def _message(event: Event) -> bytes:
    match event:
        case StepEvent(step=step, total_steps=total, preview=preview):
            shown = await SERVING.run(_data_url, preview) if preview is not None else None
            return _line("step", {"step": step, "total_steps": total, "preview": shown})
        case Finished(output=output):
            return await SERVING.run(_finished, output)
        case Queued(position=position):
            return _line("queued", {"position": position})
        case Draft(text=text) | Commit(text=text):
            return _line(type(event).__name__.lower(), {"text": text})
        case Restarted(attempt=attempt):
            return _line("restarted", {"attempt": attempt})
        case _:  # a stream raises what is left
            raise AssertionError(event)


def _finished(output: DiffusionOutput) -> bytes:
    images: Any = output.images if output.has("images") else []
    shown = [_data_url(image) for image in images if isinstance(image, Image.Image)]
    text = output.text if output.has("text") else None
    return _line("finished", {"seed": output.seed, "steps": output.timings.steps, "images": shown, "text": text})


def _line(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


def _data_url(image: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(_png(image)).decode()


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()
