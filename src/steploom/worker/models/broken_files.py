"""Files of a model that cannot be read: looked for once loading has failed, so that the message can name them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

_POINTER = b"version https://git-lfs"
_BEGINNINGS = {".gguf": (b"GGUF",), ".ckpt": (b"PK", b"\x80"), ".pt": (b"PK", b"\x80"), ".pth": (b"PK", b"\x80"),
               ".bin": (b"PK", b"\x80")}  # fmt: skip
"""How files of weights begin: a zip archive, or a pickle, for torch's."""

_CONFIGURATIONS = ("config.json", "scheduler_config.json")


def broken(place: Path) -> str | None:
    """What is wrong with the first file that cannot be read, and the mend; None if nothing is seen to be.

    Args:
        place: A file of weights, or the folder of a component or a model.
    """
    files = [place] if place.is_file() else sorted((*place.glob("*"), *place.glob("*/*")))
    for file in files:
        try:
            fault = _fault(file) if file.is_file() else None
        except OSError as error:
            fault = f"cannot be read ({error.strerror})"
        if fault is not None:
            name = file.name if place.is_file() else str(file.relative_to(place))
            return f"{name} {fault}; copy or download it again"
    return None


def _fault(file: Path) -> str | None:
    """What is wrong with one file."""
    suffix = file.suffix.lower()
    if suffix == ".json":
        return _json_fault(file)
    if suffix not in (".safetensors", ".sft", *_BEGINNINGS):
        return None
    with file.open("rb") as opened:
        start = opened.read(len(_POINTER))
    if not start:
        return "is empty"
    if start == _POINTER:
        return "is a pointer of git-lfs, not the file that it stands for (git lfs pull)"
    if suffix in _BEGINNINGS:
        return None if start.startswith(_BEGINNINGS[suffix]) else "is no file of weights of that kind"
    return _safetensors_fault(file)


def _json_fault(file: Path) -> str | None:
    try:
        found: Any = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        return f"is no JSON ({error})"
    wrong = file.name in _CONFIGURATIONS and not isinstance(found, dict)
    return f"holds a {type(found).__name__}, not an object with settings" if wrong else None


def _safetensors_fault(file: Path) -> str | None:
    """A header that says its own length, then where in the rest of the file each tensor is."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if 8 + length > size:
            return f"is cut off, or no safetensors file ({size} bytes)"
        try:
            header: Any = json.loads(opened.read(length))
        except (ValueError, RecursionError):
            return "is no safetensors file"
    if not isinstance(header, dict):
        return "is no safetensors file"
    entries = cast("dict[str, Any]", header).items()
    try:
        end = max((entry["data_offsets"][1] for name, entry in entries if name != "__metadata__"), default=0)
    except (KeyError, IndexError, TypeError):
        return "is no safetensors file"
    return None if 8 + length + end == size else f"is cut off: {size} of {8 + length + end} bytes are there"
