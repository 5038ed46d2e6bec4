"""Signatures: what the functions of pipelines and modules take, asked once each."""

from __future__ import annotations

import functools
import inspect
from typing import Any


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


def call_parameters(pipeline: Any) -> dict[str, inspect.Parameter]:
    """Parameters of the ``__call__`` of a pipeline or of its class by name, without ``self``."""
    cls: Any = pipeline if isinstance(pipeline, type) else type(pipeline)
    return dict(_named_parameters(cls.__call__))


@functools.lru_cache(maxsize=64)  # a tenth of a millisecond, twice for each request
def _named_parameters(call: Any) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(call).parameters
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {name: p for name, p in parameters.items() if name != "self" and p.kind not in kinds}


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


TEXT_TYPES = ("text", "seq")
"""What ``output_type`` means to language models."""


def output_type(pipeline: Any, wanted: str) -> str:
    """The ``output_type`` to call a pipeline with; to a language model, which has no pictures, ``"pil"`` is its own."""
    parameter = call_parameters(pipeline).get("output_type")
    default = None if parameter is None else parameter.default
    return default if wanted == "pil" and default in TEXT_TYPES else wanted
