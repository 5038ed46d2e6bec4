"""Pictures among a request's arguments: Pillow opens a file lazily, and reads it wherever it is first needed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from anyio import to_thread

from steploom.errors import InvalidRequest
from steploom.requests import DiffusionRequest


async def load_pictures(request: DiffusionRequest) -> None:
    """Reads, in a thread, what was only opened: a broken file is its request's fault, and found before anything runs.

    Raises:
        InvalidRequest: A picture cannot be read.
    """
    for name, value in request.params.items():
        for picture in _unread(value):
            try:
                await to_thread.run_sync(picture.load)
            except Exception as error:
                raise InvalidRequest(
                    f"{name}: the image cannot be read ({type(error).__name__}: {error}); give one that is whole",
                    field=name,
                ) from error


def _unread(value: Any) -> Iterator[Any]:
    """The pictures in ``value`` that Pillow has opened and not read."""
    if isinstance(value, (list, tuple)):
        for item in cast("list[Any]", value):
            yield from _unread(item)
    elif isinstance(value, dict):
        for item in cast("dict[Any, Any]", value).values():
            yield from _unread(item)
    elif getattr(value, "tile", None) and hasattr(value, "load") and hasattr(value, "mode"):
        yield value
