"""Why a pipeline failed on its pictures, said as the request's fault.

Which pictures a pipeline takes is known to nobody before: some take several for one prompt and some one, some convert
to RGB and some do not, some want a mask as large as the image. So none is refused that diffusers might take. Once a
pipeline has failed before the end of its first step, what is unusual about the pictures is looked for; and what fails
in their preprocessing, or in the module that encodes them, is a fault of theirs in any case.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Collection, Iterable, Mapping
from itertools import chain
from types import FrameType
from typing import Any

from steploom.errors import InvalidRequest, SteploomError
from steploom.media.pictures import brief, leaves
from steploom.protocol import PipelineInfo
from steploom.protocol.pictures import pictures_among, takes_pictures
from steploom.requests import DiffusionRequest
from steploom.weave.machine_faults import is_of_machine
from steploom.worker.blame.odd_pictures import Odd, empty_masks, oddities, unlike_images

_PROCESSING = re.compile(r"^(diffusers\.(.*\.)?(image|video)_processor|transformers\.(.*\.)?image_\w+|PIL)(\.|$)")
"""Modules that preprocess pictures."""
_ENCODERS = re.compile(r"^(image_encoder|vae|vqvae|vqgan|movq|vision|feature|depth)")
"""Components that are given pictures, and nothing else, before the first step."""
_OF_TYPES = (AttributeError, TypeError, LookupError)
"""What is raised by code that takes a value for one of another type."""
_OF_A_PICTURE = re.compile(r"'(Image|\w+ImageFile|(numpy\.)?ndarray|Tensor)'")
"""What Python says of a value of such a type that it does not fit."""
_SAYS_PICTURE = re.compile(r"\b(image|picture|mask|frame|video)s?\b|<\|image", re.IGNORECASE)
_SAYS_MISFIT = re.compile(
    r"shape|size|dimension|\b[2-5]D\b|channel|unpack|out of (range|bounds)|broadcast|elements|negative"
    r"|\b(d|scalar )?types?\b|not implemented for|stack expects",
    re.IGNORECASE,
)
"""What torch says, as a ``RuntimeError``, of tensors that do not fit: by their shape or by their type."""
_CROPPING = {"get_crop_region", "crop"}
"""Functions that cut out what is around a mask."""
_WORD = re.compile(r"\w+")
_QUOTED = re.compile(r"[`'\"](\w+)[`'\"]")


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
    if not _is_of_arguments(error):
        return None
    if not pictures:
        return None if steps else _of_none(error, request, info, module)
    quoted = named_in(error, info)
    suspects = {name: pictures[name] for name in quoted if name in pictures} if quoted else pictures
    if not steps:
        suspects = _in_hand(error, suspects) or suspects
    cropping = not steps and frames_in(error, _PROCESSING) & _CROPPING
    odd = next(empty_masks(pictures), None) if cropping else None
    odd = odd or _oddity(error, suspects, request, steps)
    if odd is None and suspects and not steps and (quoted or _is_about_pictures(error, module)):
        name = next((one for one in named_in(error, info, suspects) if one in suspects), next(iter(suspects)))
        odd = Odd(name, "is not what it takes", "give what the pipeline's documentation shows")
    if odd is None:
        return None
    name, what, mend = odd
    why = f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
    return InvalidRequest(
        f"{name}={brief(pictures[name])}: {what}; {mend} ({info.pipeline_class} failed on it: {why})", field=name
    )


def in_processing(error: BaseException) -> bool:
    """Whether an error was raised where pictures are preprocessed."""
    return bool(frames_in(error, _PROCESSING))


def _oddity(error: BaseException, pictures: Mapping[str, Any], request: DiffusionRequest, steps: int) -> Odd | None:
    """What is most unusual about pictures that a pipeline failed on after so many steps, or as it put them together."""
    processing = frames_in(error, _PROCESSING)
    found: Iterable[Odd] = ()
    if steps < 2 or "apply_overlay" in processing:
        found = oddities(pictures, request)
    if not steps and (processing or isinstance(error, _OF_TYPES)):
        found = chain(found, unlike_images(pictures))
    return next(iter(found), None)


def _is_about_pictures(error: BaseException, module: str | None) -> bool:
    """Whether an error was raised in the preprocessing of pictures, in what encodes them, or says so."""
    words = _SAYS_PICTURE if isinstance(error, ValueError) else _OF_A_PICTURE
    encoder = _ENCODERS.match(module or "")
    return bool(frames_in(error, _PROCESSING) or encoder or words.search(str(error)))


def _of_none(
    error: BaseException, request: DiffusionRequest, info: PipelineInfo, module: str | None
) -> InvalidRequest | None:
    """``error`` as that of a picture that is missing; None if it is not known to be that."""
    takes = [parameter.name for parameter in info.parameters if takes_pictures(parameter)]
    usual = [name for name in takes if name in ("image", "video")]
    text = str(error)
    prompted = request.prompt is not None or not any(parameter.name == "prompt" for parameter in info.parameters)
    adapted = "`image_embeds`" in text or (module == "unet" and "argument of type 'NoneType'" in text)
    if adapted and "ip_adapter_image" in takes:
        name = "ip_adapter_image"
    elif usual and (frames_in(error, _PROCESSING) or (prompted and "NoneType" in text)):
        name = usual[0]
    else:
        return None
    why = f"{info.pipeline_class} failed without it: {text:.200}"
    return InvalidRequest(f"{name}: must be given; give a picture ({why})", field=name)


def named_in(error: BaseException, info: PipelineInfo, given: Collection[str] = ()) -> list[str]:
    """The arguments of the pipeline that an error quotes, in its order; else those of ``given`` that it names."""
    known = {parameter.name for parameter in info.parameters}
    quoted = [name for name in dict.fromkeys(_QUOTED.findall(str(error))) if name in known]
    words = dict.fromkeys(_WORD.findall(str(error)))
    return quoted or [name for name in given if name in words or f"{name}s" in words]


def frames_in(error: BaseException, modules: re.Pattern[str]) -> set[str]:
    """The functions of ``modules`` in which an error was raised, or through which it went."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return {frame.f_code.co_name for frame in frames if _is_of(frame, modules)}


def _in_hand(error: BaseException, suspects: Mapping[str, Any]) -> dict[str, Any]:
    """The picture that was being preprocessed when an error was raised; empty if none was."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if _is_of(frame, _PROCESSING)]
    for frame in reversed(frames):
        values = [value[0] if isinstance(value, list) and value else value for value in frame.f_locals.values()]
        there = set(map(id, [*values, *frame.f_locals.values()]))
        for name, value in suspects.items():
            if there & {id(one) for one in (value, *leaves(name, value)) if one is not None}:
                return {name: value}
    return {}


def _is_of(frame: FrameType, modules: re.Pattern[str]) -> bool:
    return modules.match(str(frame.f_globals.get("__name__", ""))) is not None


def _is_of_arguments(error: BaseException) -> bool:
    """Whether an exception is of a kind that wrong arguments cause, somewhere in torch or in Pillow."""
    if isinstance(error, SteploomError) or not isinstance(error, Exception) or is_of_machine(error):
        return False
    if isinstance(error, RuntimeError):
        return _SAYS_MISFIT.search(str(error)) is not None
    known = (ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError)
    return isinstance(error, known) or type(error).__module__.startswith(("PIL", "cv2"))
