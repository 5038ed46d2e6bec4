"""Objects to bytes and back: a msgpack header, and payloads (pixels, numbers) as frames beside it.

``encode`` gives ``[header, frame, ...]``; ``decode`` takes them back. Structs of the protocol are written by msgspec as
they stand, which costs microseconds; only their fields declared ``Any`` are walked. In them travel None, booleans,
numbers, text, bytes, lists, tuples, sets, dicts with text or integer keys, torch tensors, numpy arrays and scalars, PIL
images, ``torch.dtype``, ``torch.device`` and ``torch.Generator`` (its state at that moment), the structs, requests and
errors of this library, and dataclasses that diffusers (or the loaded pipeline's package) defines. Everything else is an
:class:`~steploom.errors.InvalidRequest` that names the field. There is no pickle: decoding builds these types and no
other.

Payloads are not copied: a frame is the memory of the tensor or array itself (of a copy if it was not contiguous or not
on the CPU), and a decoded tensor or array lies over the received frame. It is writable: a frame that is not (``bytes``)
is copied. Nobody may change a tensor between ``encode`` and the moment it is sent.

torch, numpy and PIL are imported by the first value that needs them, not before. diffusers is never imported by
decoding: where a process has not imported it, its dataclasses become :class:`Record`.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import UnionType
from typing import Any, TypeVar, overload

from steploom.codec.reader import read
from steploom.codec.record import Record
from steploom.codec.rules import FRAME_BYTES, PACKAGES, WORDS_BYTES, Buffer
from steploom.codec.writer import Writer
from steploom.errors import InvalidRequest, ProtocolError
from steploom.requests import DiffusionRequest

__all__ = ["PACKAGES", "Buffer", "Record", "Room", "check_request", "decode", "encode", "size"]

T = TypeVar("T")


def size(frames: Sequence[Buffer]) -> int:
    """Bytes of a message."""
    return sum(memoryview(frame).nbytes for frame in frames)


class Room:
    """What there is room for in one message of several parts, which are encoded one by one beforehand.

    Args:
        limit: Bytes of the message, at most.
        parts: How many there are; for each there is room for why it was refused.
    """

    def __init__(self, limit: int, parts: int) -> None:
        self._limit = limit
        self._left = limit - FRAME_BYTES - parts * WORDS_BYTES

    def take(self, part: Sequence[Buffer]) -> None:
        """One part more.

        Raises:
            InvalidRequest: There is no room for it.
        """
        nbytes = size(part)
        if nbytes > self._left:
            there = f"these are {nbytes} bytes, and there is room for {max(self._left, 0)}"
            raise InvalidRequest(f"max_message_bytes={self._limit}: {there}; raise it")
        self._left -= nbytes


def encode(value: Any, *, packages: Sequence[str] = PACKAGES, limit: int | None = None) -> list[Buffer]:
    """The header and the payload frames of ``value``.

    Args:
        value: A struct or request (``decode`` must be told its type), or anything that the package's docstring lists.
        packages: Top-level packages whose dataclasses may travel.
        limit: Bytes that it may come to.

    Raises:
        InvalidRequest: Something in it cannot travel, and the message names the field; or it is too large.
    """
    frames: list[Buffer] = [b""]
    frames[0] = Writer(frames, packages).header(value)
    if limit is not None and (nbytes := size(frames)) > limit:
        raise InvalidRequest(f"max_message_bytes={limit}: a message of {nbytes} bytes would be sent; raise it")
    return frames


def check_request(request: DiffusionRequest, *, packages: Sequence[str] = PACKAGES) -> None:
    """Checks that ``request`` can travel, without touching its payloads.

    Raises:
        InvalidRequest: It cannot; the message names the field and the mend.
    """
    Writer(None, packages).header(request)


@overload
def decode(
    frames: Sequence[Buffer], kind: type[T], *, packages: Sequence[str] = PACKAGES, limit: int | None = None
) -> T: ...
@overload
def decode(
    frames: Sequence[Buffer], kind: UnionType, *, packages: Sequence[str] = PACKAGES, limit: int | None = None
) -> Any: ...
def decode(frames: Sequence[Buffer], kind: Any, *, packages: Sequence[str] = PACKAGES, limit: int | None = None) -> Any:
    """The value of type ``kind`` that ``encode`` made ``frames`` of.

    Raises:
        ProtocolError: The frames do not hold such a value, or are more than ``limit`` bytes.
    """
    if limit is not None and (nbytes := size(frames)) > limit:
        raise ProtocolError(f"max_message_bytes={limit}: a message of {nbytes} bytes has come")
    return read(frames, kind, packages)
