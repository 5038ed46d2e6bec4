"""Objects to bytes and back: a msgpack header, and payloads (pixels, numbers) as frames beside it.

``encode`` gives ``[header, frame, ...]``; ``decode`` takes them back. Structs of the protocol are written by msgspec as
they stand, which costs microseconds; only their fields declared ``Any`` are walked. In them travel None, booleans,
numbers, text, bytes, lists, tuples, sets, dicts with text or integer keys, torch tensors, numpy arrays and scalars, PIL
images, ``torch.dtype`` and ``torch.device``, the structs, requests and errors of this library, and dataclasses that
diffusers (or the loaded pipeline's package) defines. Everything else is an :class:`~steploom.errors.InvalidRequest`
that names the field. There is no pickle: decoding builds these types and no other.

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
from steploom.codec.rules import PACKAGES, Buffer
from steploom.codec.writer import Writer
from steploom.requests import DiffusionRequest

__all__ = ["PACKAGES", "Buffer", "Record", "check_request", "decode", "encode"]

T = TypeVar("T")


def encode(value: Any, *, packages: Sequence[str] = PACKAGES) -> list[Buffer]:
    """The header and the payload frames of ``value``.

    Args:
        value: A struct or request (``decode`` must be told its type), or anything that the package's docstring lists.
        packages: Top-level packages whose dataclasses may travel.

    Raises:
        InvalidRequest: Something in it cannot travel; the message names the field.
    """
    frames: list[Buffer] = [b""]
    frames[0] = Writer(frames, packages).header(value)
    return frames


def check_request(request: DiffusionRequest, *, packages: Sequence[str] = PACKAGES) -> None:
    """Checks that ``request`` can travel, without touching its payloads.

    Raises:
        InvalidRequest: It cannot; the message names the field and the mend.
    """
    Writer(None, packages).header(request)


@overload
def decode(frames: Sequence[Buffer], kind: type[T], *, packages: Sequence[str] = PACKAGES) -> T: ...
@overload
def decode(frames: Sequence[Buffer], kind: UnionType, *, packages: Sequence[str] = PACKAGES) -> Any: ...
def decode(frames: Sequence[Buffer], kind: Any, *, packages: Sequence[str] = PACKAGES) -> Any:
    """The value of type ``kind`` that ``encode`` made ``frames`` of.

    Raises:
        ProtocolError: The frames do not hold such a value.
    """
    return read(frames, kind, packages)
