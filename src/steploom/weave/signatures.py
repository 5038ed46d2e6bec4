"""Signatures: what the functions of pipelines and modules take, asked once each."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from steploom.weave import source_code, untyped


def takes(function: Any, argument: str) -> bool:
    """Whether ``function`` has a parameter of that name."""
    plain = getattr(function, "__func__", None)
    if plain is None:  # an object's own, which may hold the object: not to be kept
        return argument in _names(function)
    return argument in _names_of_method(plain)


def _names(function: Any) -> frozenset[str]:
    try:
        return frozenset(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return frozenset()


_names_of_method = functools.lru_cache(maxsize=256)(_names)  # six calls of encoders ask for each request


def parameters_of(function: Any) -> list[str]:
    """The names of a function's parameters."""
    return list(inspect.signature(function).parameters)


def needed_by(function: Any) -> list[str]:
    """The names of the parameters that a function has no defaults for."""
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    parameters = inspect.signature(function).parameters
    return [name for name, one in parameters.items() if one.default is one.empty and one.kind not in kinds]


def call_parameters(pipeline: Any) -> dict[str, inspect.Parameter]:
    """Parameters of the ``__call__`` of a pipeline or of its class by name, without ``self``.

    Of one's own class that takes ``**kwargs`` these are also those of the class below, to which it hands them; and in
    any case ``generator``: else its requests' seeds would mean nothing.
    """
    cls: Any = pipeline if isinstance(pipeline, type) else type(pipeline)
    calls = [vars(base)["__call__"] for base in cls.__mro__ if "__call__" in vars(base)]
    found: dict[str, inspect.Parameter] = {}
    for call in calls or [cls.__call__]:
        named, handed_on = _named_parameters(call)
        found = {**named, **found}
        if not handed_on:
            break
        found.setdefault("generator", _GENERATOR)
    return found


_GENERATOR = inspect.Parameter("generator", inspect.Parameter.KEYWORD_ONLY, default=None)


@functools.lru_cache(maxsize=64)  # a tenth of a millisecond, twice for each request
def _named_parameters(call: Any) -> tuple[dict[str, inspect.Parameter], bool]:
    """The named ones, and whether others are handed on: diffusers' own take old names only out of ``**kwargs``."""
    parameters = inspect.signature(call).parameters
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    handed_on = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    ours = not str(getattr(inspect.unwrap(call), "__module__", "")).startswith("diffusers.")
    return {name: p for name, p in parameters.items() if name != "self" and p.kind not in kinds}, handed_on and ours


def hidden_parameters(pipeline: Any) -> tuple[str, ...]:
    """Parameters that ``__call__`` takes out of its ``**kwargs``: the callbacks of older diffusers."""
    call = type(pipeline).__call__
    code = getattr(inspect.unwrap(call), "__code__", None)
    if code is None or not code.co_flags & inspect.CO_VARKEYWORDS:
        return ()
    return tuple(name for name in ("callback", "callback_steps") if name in code.co_consts)


def defaults(pipeline: Any) -> dict[str, Any]:
    """Defaults of the parameters of the pipeline's ``__call__`` by name."""
    return {n: p.default for n, p in call_parameters(pipeline).items() if p.default is not p.empty}


_TEXT_TYPES = ("text", "seq")
"""What ``output_type`` means to language models."""

_IMAGE_TYPES = ("pil", "np", "pt", "latent")
"""What it means to diffusers' processors of images and videos."""


def output_types(pipeline: Any) -> list[str]:
    """What a pipeline takes as ``output_type``, as far as its source says; none where nobody knows."""
    stages = (getattr(pipeline, name, None) for name in _handed_to(type(pipeline)))
    stage = next(filter(untyped.is_pipeline, stages), None)
    return list(_output_types(type(pipeline if stage is None else stage)))


@functools.lru_cache(maxsize=64)  # asked for each request
def _handed_to(cls: Any) -> tuple[str, ...]:
    """The methods and stages that ``__call__`` hands its ``output_type`` to, which may refuse it at the end."""
    call = source_code.function(cls, "__call__")
    return () if call is None else tuple(source_code.handed_to(call, "output_type"))


@functools.lru_cache(maxsize=64)
def _output_types(cls: Any) -> tuple[str, ...]:
    parameter = call_parameters(cls).get("output_type")
    if parameter is None:
        return ()
    names = ("__call__", "check_inputs", *_handed_to(cls))
    bodies = (source_code.function(cls, name) for name in dict.fromkeys(names))
    needed, known = source_code.strings_for(filter(None, bodies), "output_type")
    if needed or not inspect.unwrap(cls.__call__).__module__.startswith("diffusers."):
        return tuple(sorted(needed))  # others than diffusers may hand it to whatever they like
    usual = _TEXT_TYPES if parameter.default in _TEXT_TYPES else _IMAGE_TYPES
    return tuple(sorted({*usual, *known, *filter(None, [parameter.default])}))


def output_type(pipeline: Any, wanted: str) -> str:
    """The ``output_type`` to call a pipeline with: what ``"pil"`` says to one that makes no images is its own."""
    parameter, taken = call_parameters(pipeline).get("output_type"), output_types(pipeline)
    default = None if parameter is None else parameter.default
    strange = "pil" not in taken if taken else default in _TEXT_TYPES
    return default if wanted == "pil" and default is not None and strange else wanted
