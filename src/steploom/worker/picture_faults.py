"""Why a pipeline failed on its pictures, said as the request's fault.

Which pictures a pipeline takes is known to nobody before: some take several for one prompt and some one, some convert
to RGB and some do not, some want a mask as large as the image. So none is refused that diffusers might take. Once a
pipeline has failed before the end of its first step, what is unusual about the pictures is looked for; and what fails
in their preprocessing, or in the module that encodes them, is a fault of theirs in any case.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from steploom.errors import InvalidRequest, SteploomError
from steploom.media.pictures import brief, is_image, is_tensor, leaves, shape_of, size_of
from steploom.protocol import PipelineInfo
from steploom.protocol.pictures import is_video, pictures_among
from steploom.requests import DiffusionRequest

SMALL = 16
"""Pixels along a side below which a picture is unusual."""

_SHOWN = 3
_PROCESSING = re.compile(r"^(diffusers\.(.*\.)?(image|video)_processor|transformers\.(.*\.)?image_\w+|PIL)(\.|$)")
"""Modules that preprocess pictures."""
_ENCODERS = re.compile(r"^(image_encoder|vae|vqvae|vqgan|movq|vision|feature|depth)")
"""Components that are given pictures, and nothing else, before the first step."""
_OURS = re.compile(r"out of memory|can't allocate|CUDA error|cuDNN|NCCL", re.IGNORECASE)
"""What a ``RuntimeError`` says that is the machine's fault."""
_OF_TYPES = (AttributeError, TypeError, LookupError)
"""What is raised by code that takes a value for one of another type."""
_OF_A_PICTURE = re.compile(r"'(Image|\w+ImageFile|(numpy\.)?ndarray|Tensor)'")
"""What Python says of a value of such a type that it does not fit."""
_WORD = re.compile(r"\w+")
_QUOTED = re.compile(r"[`'\"](\w+)[`'\"]")


class Odd(NamedTuple):
    """What is unusual about the pictures of one argument."""

    name: str
    what: str
    mend: str


def of_pictures(
    error: BaseException, request: DiffusionRequest, info: PipelineInfo, *, steps: int, module: str | None
) -> InvalidRequest | None:
    """``error`` as the fault of one of the request's pictures; None if it seems to be none of theirs.

    Args:
        error: What the pipeline raised, with its traceback.
        request: As the pipeline got it.
        info: The pipeline that does the request's task.
        steps: How many it had done.
        module: The component whose call failed, if one did.
    """
    pictures = pictures_among(request.params, info)
    if not pictures or not _is_of_arguments(error):
        return None
    named = named_in(error, info, pictures)
    suspects = {name: pictures[name] for name in named if name in pictures} if named else pictures
    processing = frames_in(error, _PROCESSING)
    odd = next(oddities(suspects, request), None) if steps < 2 or "apply_overlay" in processing else None
    if odd is None and not steps and isinstance(error, _OF_TYPES):
        odd = next(_unlike_images(suspects), None)
    touched = processing or named or _ENCODERS.match(module or "") or _OF_A_PICTURE.search(str(error))
    if not suspects or (odd is None and (steps or not touched)):
        return None
    odd = odd or Odd(next(iter(suspects)), "is not what it takes", "give what the pipeline's documentation shows")
    name, what, mend = odd
    why = f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
    return InvalidRequest(
        f"{name}={brief(suspects[name])}: {what}; {mend} ({info.pipeline_class} failed on it: {why})", field=name
    )


def named_in(error: BaseException, info: PipelineInfo, given: Collection[str]) -> list[str]:
    """The arguments of the pipeline that an error quotes, in its order; else those that it names and that are given."""
    known = {parameter.name for parameter in info.parameters}
    quoted = [name for name in dict.fromkeys(_QUOTED.findall(str(error))) if name in known]
    return quoted or [name for name in dict.fromkeys(_WORD.findall(str(error))) if name in given]


def frames_in(error: BaseException, modules: re.Pattern[str]) -> set[str]:
    """The functions of ``modules`` in which an error was raised, or through which it went."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return {frame.f_code.co_name for frame in frames if modules.match(str(frame.f_globals.get("__name__", "")))}


def _is_of_arguments(error: BaseException) -> bool:
    """Whether an exception is of a kind that wrong arguments cause, somewhere in torch or in Pillow."""
    if isinstance(error, (SteploomError, torch.OutOfMemoryError, MemoryError)) or not isinstance(error, Exception):
        return False
    if isinstance(error, RuntimeError) and _OURS.search(str(error)):
        return False
    known = (ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError, RuntimeError)
    return isinstance(error, known) or type(error).__module__.startswith(("PIL", "cv2"))


def oddities(pictures: Mapping[str, Any], request: DiffusionRequest) -> Iterator[Odd]:
    """What is unusual about pictures, the most unusual first."""
    for name, value in pictures.items():
        found = list(leaves(name, value))
        there = [leaf for leaf in found if leaf is not None]
        if len(there) < len(found):
            yield Odd(name, f"{len(found) - len(there)} of {len(found)} are None", "leave them out")
        kinds = {_kind(leaf) for leaf in there}
        if len(kinds) > 1:
            yield Odd(name, f"holds {' and '.join(sorted(kinds))}", "give them all as PIL images")
        for leaf in there:
            yield from _odd(name, leaf)
        yield from _odd_together(name, value, there, request)
    yield from _unequal(pictures)


def _odd(name: str, leaf: Any) -> Iterator[Odd]:
    """About one picture."""
    if is_image(leaf) and leaf.mode != "RGB" and not (_is_mask(name) and leaf.mode in ("L", "1")):
        mend = "image.convert('L')" if _is_mask(name) else "image.convert('RGB')"
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
    if is_video(name):
        count = 1
    elif isinstance(value, (list, tuple)):
        count = len(value)
    else:
        shape = shape_of(value) or ()
        count = shape[0] if len(shape) > 3 else 1
    prompts = len(request.prompt) if isinstance(request.prompt, list) else 1
    if count > 1 and count != prompts:
        several = "prompts" if prompts > 1 else "prompt"
        yield Odd(name, f"{count} pictures for {prompts} {several}", "send one, or as many as there are prompts")
    sizes = dict.fromkeys(size for leaf in there if (size := size_of(leaf)) is not None)
    if len(sizes) > 1:
        several = " and ".join(f"{width}x{height}" for width, height in list(sizes)[:_SHOWN])
        yield Odd(name, f"are of different sizes, {several}", "make them equal")


def _unequal(pictures: Mapping[str, Any]) -> Iterator[Odd]:
    """About pictures of several arguments that are not of one size."""
    firsts = {name: size_of(next(leaves(name, value), None)) for name, value in pictures.items()}
    known = {name: size for name, size in firsts.items() if size is not None}
    for first in known:
        for name, size in known.items():
            if size != known[first]:
                width, height = known[first]
                yield Odd(name, f"is of {size[0]}x{size[1]}, but {first} of {width}x{height}", "make them equal")


def _unlike_images(pictures: Mapping[str, Any]) -> Iterator[Odd]:
    """About what is none of PIL's, although most pipelines take it."""
    for name, value in pictures.items():
        if isinstance(value, tuple):
            yield Odd(name, "is a tuple", "give a list")
        if not all(map(is_image, leaves(name, value))):
            yield Odd(name, "is no PIL image", "give one")


def _is_mask(name: str) -> bool:
    return "mask" in name


def _kind(leaf: Any) -> str:
    if is_image(leaf):
        return "PIL images"
    return "tensors" if is_tensor(leaf) else "arrays" if shape_of(leaf) is not None else type(leaf).__name__
