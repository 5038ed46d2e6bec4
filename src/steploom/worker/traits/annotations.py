"""What kind of value each argument of a pipeline takes, by the annotations of its ``__call__``."""

from __future__ import annotations

import collections.abc
import inspect
import typing
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Any

from steploom.protocol.pictures import PICTURE, named_as_picture
from steploom.weave import source_code

_TENSORS = ("latents", "embeds")
"""In names of arguments whose annotation as a tensor is meant: others take arrays and pictures, too."""
_PICTURES = {"Image", "ndarray", "Tensor", "FloatTensor", "str", "Path"}
"""Names of the types that a picture may have in annotations."""


_READING = ("__call__", "check_inputs", "encode_prompt", "prepare_latents")
"""Where pipelines read their arguments."""


def kinds(pipeline_class: type) -> dict[str, str]:
    """The kinds of a pipeline's arguments by name, as :class:`steploom.protocol.Parameter` has them."""
    call: Any = pipeline_class.__call__
    try:
        hints = typing.get_type_hints(inspect.unwrap(call))
    except (NameError, TypeError, AttributeError):  # annotations that only a type checker understands
        return {}
    texts = "text_by_frame" if hasattr(pipeline_class, "free_noise_enabled") else "text"
    found = {name: _kind(name, hint) for name, hint in hints.items()}
    return {name: texts if kind == "text" else kind for name, kind in found.items() if kind}


def takes_none(pipeline: Any, parameter: inspect.Parameter) -> bool:
    """Whether None may be given for a parameter: for a number that has a default, only if the pipeline asks for it."""
    if isinstance(parameter.default, bool) or not isinstance(parameter.default, (int, float)):
        return True
    bodies = [source_code.function(pipeline, name) for name in _READING]
    return bodies[0] is None or any(source_code.asks_for_none(body, parameter.name) for body in bodies if body)


def _kind(name: str, hint: Any) -> str:
    members = {member for member in _members(hint) if member is not NoneType}
    if not members or name == "return":
        return ""
    if members <= {int, float}:
        return "number"
    if named_as_picture(name):
        return _picture_kind(set(_leaves(hint)) - {NoneType})
    if members <= {str, list[str], typing.List[str]} and "embeds" not in name:  # noqa: UP006 - diffusers writes both
        return "text"
    if all(getattr(one, "__name__", "").endswith("Tensor") for one in members) and any(
        part in name for part in _TENSORS
    ):
        return "tensor"
    if all(typing.get_origin(one) is dict or one is dict for one in members):
        return "mapping"
    return "function" if any(typing.get_origin(one) is collections.abc.Callable for one in members) else ""


def _picture_kind(leaves: set[Any]) -> str:
    """Of an argument that is named like one that takes pictures. Where diffusers says tensors it often takes others."""
    names = {getattr(leaf, "__name__", "") for leaf in leaves}
    if "Image" in names and names <= _PICTURES:
        return PICTURE
    return "other" if leaves <= {int, float, bool} else ""


def _leaves(hint: Any) -> Iterator[Any]:
    """The types that a hint allows, those within lists among them."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, UnionType, list, tuple):
        for member in typing.get_args(hint):
            yield from _leaves(member)
    else:
        yield hint


def _members(hint: Any) -> tuple[Any, ...]:
    """The types that a hint allows."""
    if typing.get_origin(hint) in (typing.Union, UnionType):
        return typing.get_args(hint)
    return (hint,)
