"""What is unusual about pictures: which some pipelines take, and others fail on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from steploom.media.pictures import is_image, is_tensor, leaves, lost_in_8_bits, shape_of, size_of
from steploom.protocol.pictures import is_video
from steploom.requests import DiffusionRequest

SMALL = 16
"""Pixels along a side below which a picture is unusual."""

_SHOWN = 3


class Odd(NamedTuple):
    """What is unusual about the pictures of one argument."""

    name: str
    what: str
    mend: str


def oddities(pictures: Mapping[str, Any], request: DiffusionRequest) -> Iterator[Odd]:
    """What is unusual about pictures, the most unusual first."""
    for name, value in pictures.items():
        found = list(leaves(name, value))
        there = [leaf for leaf in found if leaf is not None]
        kinds = {_kind(leaf) for leaf in there}
        if len(kinds) > 1:
            yield Odd(name, f"holds {' and '.join(sorted(kinds))}", "give them all as PIL images")
        for leaf in there:
            yield from _odd(name, leaf)
        if len(there) < len(found):
            yield Odd(name, f"{len(found) - len(there)} of {len(found)} are None", "leave them out")
        yield from _odd_together(name, value, there, request)
    yield from _unequal(pictures)


def _odd(name: str, leaf: Any) -> Iterator[Odd]:
    """About one picture."""
    if is_image(leaf) and leaf.mode != "RGB" and not (_is_mask(name) and leaf.mode in ("L", "1")):
        plain = "image.convert('L')" if _is_mask(name) else "image.convert('RGB')"
        mend = lost_in_8_bits(leaf, mask=_is_mask(name)) or plain
        yield Odd(name, f"is of mode {leaf.mode}", f"convert it: {mend}")
    shape = shape_of(leaf)
    if shape is not None:
        channels = 0 if len(shape) == 2 else shape[-3] if is_tensor(leaf) else shape[-1]
        layout = "[3, height, width]" if is_tensor(leaf) else "[height, width, 3]"
        if _is_mask(name) and channels > 1:
            yield Odd(name, f"has {channels} channels", "give [height, width]")
        if not _is_mask(name) and channels != 3:
            yield Odd(name, f"has {channels or 'no'} channels", f"give {layout}")
        if len(shape) == 5 and not is_video(name):
            yield Odd(name, "is 5-dimensional", f"give {layout}")
    size = size_of(leaf)
    if size is not None and min(size) < SMALL:
        yield Odd(name, f"is of {size[0]}x{size[1]} pixels", "make it larger")


def _odd_together(name: str, value: Any, there: list[Any], request: DiffusionRequest) -> Iterator[Odd]:
    """About several pictures of one argument."""
    count = len(_rows(name, value))
    prompts = len(request.prompt) if isinstance(request.prompt, list) else 1
    if count > 1 and count != prompts and request.prompt is not None:
        several = "prompts" if prompts > 1 else "prompt"
        yield Odd(name, f"{count} pictures for {prompts} {several}", "send one, or as many as there are prompts")
    sizes = dict.fromkeys(size for leaf in there if (size := size_of(leaf)) is not None)
    if len(sizes) > 1:
        several = " and ".join(f"{width}x{height}" for width, height in list(sizes)[:_SHOWN])
        yield Odd(name, f"are of different sizes, {several}", "make them equal")


def _rows(name: str, value: Any) -> Sequence[Any]:
    """What an argument holds for several prompts: pictures, or videos."""
    listed = isinstance(value, (list, tuple))
    if is_video(name) and not (listed and value and isinstance(value[0], (list, tuple))):
        return () if len(shape_of(value) or ()) < 5 else value
    return value if listed or len(shape_of(value) or ()) > 3 else ()


def _unequal(pictures: Mapping[str, Any]) -> Iterator[Odd]:
    """About pictures of several arguments that are not of one size."""
    firsts = {name: size_of(next(leaves(name, value), None)) for name, value in pictures.items()}
    known = {name: size for name, size in firsts.items() if size is not None}
    for first in known:
        for name, size in known.items():
            if size != known[first]:
                width, height = known[first]
                yield Odd(name, f"is of {size[0]}x{size[1]}, but {first} of {width}x{height}", "make them equal")


def unlike_images(pictures: Mapping[str, Any]) -> Iterator[Odd]:
    """What is none of PIL's pictures, or no list of them, although most pipelines take it."""
    for name, value in pictures.items():
        if isinstance(value, tuple):
            yield Odd(name, "is a tuple", "give a list")
        if not all(map(is_image, leaves(name, value))):
            yield Odd(name, "is no PIL image", "give one")


def empty_masks(pictures: Mapping[str, Any]) -> Iterator[Odd]:
    """Masks that are all black, so that there is nothing to cut out around."""
    for name, value in pictures.items():
        leaves_here = leaves(name, value) if _is_mask(name) else ()
        if any(is_image(leaf) and leaf.convert("L").getbbox() is None for leaf in leaves_here):
            yield Odd(name, "has no white pixel to crop around", "paint some white, or leave padding_mask_crop out")


def _is_mask(name: str) -> bool:
    return "mask" in name


def _kind(leaf: Any) -> str:
    if is_image(leaf):
        return "PIL images"
    return "tensors" if is_tensor(leaf) else "arrays" if shape_of(leaf) is not None else type(leaf).__name__
