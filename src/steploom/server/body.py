"""Bodies of requests: JSON, or a form with files; decoded into plain values and the bytes of pictures."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterable
from typing import Any, cast

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import Request

from steploom.given import is_whole
from steploom.server.errors import ApiError, invalid
from steploom.server.kinds import FormText
from steploom.server.settings import ServerSettings
from steploom.threads import SERVING

MAX_IMAGES = 16
"""Pictures of one request, as OpenAI has it."""

LARGE = 256 * 1024
"""Bytes from which on decoding is work for a thread."""

MAX_COMMAS = 200_000
"""Of a JSON body, those of its prompt among them; base64 has none."""

_MAX_FIELDS = 100
_JSON = ("application/json", "")
_MAX_DEPTH = 32
_NESTED = re.compile(r"([^\[\]]+)(\[\])?\[([^\[\]]+)\]")


async def read_body(request: Request, settings: ServerSettings) -> dict[str, Any]:
    """The fields of a body by name. Files are bytes; what a form has several times is a list.

    Raises:
        ApiError: 400 where it cannot be decoded, 413 where it is too large, 415 where it is of another type.
    """
    kind = _kind(request)
    if kind in _JSON:
        return await read_json(request)
    if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        return await _form(request, settings)
    raise ApiError(415, f"Content-Type={kind!r:.80}: must be application/json or multipart/form-data")


def _object(body: bytes) -> dict[str, Any]:
    if body.count(b",") > MAX_COMMAS:  # decoding them all would stall every thread, and fill the memory
        raise ApiError(400, f"the body has more than {MAX_COMMAS} values or commas", code="invalid_json")
    try:
        value = json.loads(body.decode("utf-8-sig"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    fields = cast("dict[str, Any]", value)
    for name, entry in fields.items():
        _check_sound(name.encode("ascii", "backslashreplace").decode(), name, 0)
        _check_sound(name, entry, 0)
    return fields


def _check_sound(name: str, value: Any, depth: int) -> None:
    """JSON can say what nothing behind it can: halves of characters, and lists in lists without end.

    Raises:
        ApiError: 400 with the field's name in ``param``.
    """
    if depth > _MAX_DEPTH:
        raise invalid(f"{name:.80}: is nested more than {_MAX_DEPTH} deep", name[:80])
    if isinstance(value, str):
        if not is_whole(value):
            raise invalid(f"{name:.80}: has half of a surrogate pair; send whole characters", name[:80])
    elif isinstance(value, dict):
        for part in cast("dict[str, Any]", value).items():
            _check_sound(name, list(part), depth + 1)
    elif isinstance(value, list):
        for part in cast("list[Any]", value):
            _check_sound(name, part, depth + 1)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


async def read_json(request: Request) -> dict[str, Any]:
    """The fields of a JSON body by name.

    Raises:
        ApiError: 400 where it cannot be decoded, 413 where it is too large, 415 where it is of another type.
    """
    kind = _kind(request)
    if kind not in _JSON:
        raise ApiError(415, f"Content-Type={kind!r:.80}: must be application/json")
    body = await request.body()
    return _object(body) if len(body) < LARGE else await SERVING.run(_object, body)


def _kind(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def _form(request: Request, settings: ServerSettings) -> dict[str, Any]:
    found: dict[str, Any] = {}
    try:
        async with request.form(
            max_files=2 * MAX_IMAGES, max_fields=_MAX_FIELDS, max_part_size=settings.max_body_bytes
        ) as form:
            for name, value in form.multi_items():
                read = await value.read() if isinstance(value, UploadFile) else FormText(value)
                key = name.partition("[")[0]
                _check_sound(key.encode("ascii", "backslashreplace").decode(), [name, read], 0)
                _put(found, name, read)
    except MultiPartException as error:
        raise ApiError(400, f"the form cannot be read: {error.message}", code="invalid_form") from None
    return found


def _put(found: dict[str, Any], name: str, value: Any) -> None:
    """Takes in one part of a form: ``a``, ``a[]`` of a list, ``a[b]`` of an object, ``a[][b]`` of a list of objects."""
    nested = _NESTED.fullmatch(name)
    if nested:
        key, listed, inner = nested.groups()
        before: Any = found.setdefault(key, [] if listed else {})
        fits = isinstance(before, list if listed else dict)
        entries = cast("list[Any]", before if listed and fits else [before])
        if fits and listed and (not entries or inner in entries[-1]):
            entries.append({})
        if not fits or not isinstance(entries[-1], dict):
            raise invalid(f"{name:.80}: the form has {key:.80} in another shape, too", key[:80], "invalid_form")
        cast("dict[str, Any]", entries[-1])[inner] = value
        return
    key = name.removesuffix("[]")
    if name != key or key in found:
        before = found.get(key, [])
        found[key] = [*(cast("list[Any]", before) if isinstance(before, list) else [before]), value]
    else:
        found[key] = value


def take_pictures(given: dict[str, Any], *names: str) -> list[bytes]:
    """Takes the pictures of the fields ``names`` out of ``given``: files of a form, or base64 text of JSON.

    Raises:
        ApiError: 400: one is neither, or there are too many.
    """
    pictures = [
        _picture(name, entry)
        for name in names
        if given.get(name) is not None
        for entry in _entries(given[name])
    ]  # fmt: skip
    for name in names:
        given.pop(name, None)
    if len(pictures) > MAX_IMAGES:
        raise invalid(f"{names[0]}: {len(pictures)} images, at most {MAX_IMAGES}", names[0])
    return pictures


def _entries(value: Any) -> Iterable[Any]:
    return cast("list[Any]", value) if isinstance(value, list) else [value]


def _picture(name: str, entry: Any) -> bytes:
    if isinstance(entry, dict):  # {"image_url": "data:..."}, as OpenAI's JSON has it
        links = cast("dict[str, Any]", entry)
        entry = links.get("image_url") or links.get("b64_json")
        entry = cast("dict[str, Any]", entry).get("url") if isinstance(entry, dict) else entry
    if isinstance(entry, bytes):
        if not entry:
            raise invalid(f"{name}: the file is empty", name)
        return entry
    if not isinstance(entry, str):
        raise invalid(f"{name}: must be a file, or base64 text", name, "invalid_type")
    head, comma, data = entry.partition(",")
    if not (comma and head.startswith("data:")):
        data = entry
        if "://" in entry[:20]:
            raise invalid(f"{name}={entry!r:.80}: no address is fetched here; send the image itself", name)
    try:
        decoded = base64.b64decode("".join(data.split()), validate=True)  # many tools break it into lines
    except (binascii.Error, ValueError):
        raise invalid(f"{name}: is no base64 text", name) from None
    if not decoded:
        raise invalid(f"{name}: is empty", name)
    return decoded
