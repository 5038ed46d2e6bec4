"""Locks that an application's pipeline takes: two programs of one thread would wait for each other for ever."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from types import FunctionType, MethodType
from typing import Any

from steploom.weave import untyped
from steploom.weave.modules.bytecode import around, names
from steploom.weave.modules.rebuilding import attributes_of
from steploom.weave.modules.references import is_library

_REENTRANT = (type(threading.RLock()), threading.Condition)


def lock_of(pipeline: Any) -> str | None:
    """The name of a lock that the application's methods use, and that one thread cannot take twice.

    Args:
        pipeline: Its methods count, and those of its noise scheduler and tokenizers. Those of modules run in one piece.
    """
    parts = [one for one in vars(pipeline).values() if untyped.is_noise_scheduler(one) or untyped.is_tokenizer(one)]
    for holder in (pipeline, *parts):
        members = attributes_of(holder)
        for function in methods_of(holder) if members else ():
            known = around(function)
            for name in names(function.__code__) | set(function.__code__.co_freevars):
                for value in (members.get(name), inspect.getattr_static(type(holder), name, None), known.get(name)):
                    if _locks(value) or (_is_helper(value) and any(map(_locks, list(attributes_of(value).values())))):
                        return name
    return None


def methods_of(holder: Any) -> Iterator[FunctionType]:
    """The methods that are not the library's, of the class and of the object."""
    classes = [one for one in type(holder).__mro__ if one is not object and not is_library(one)]
    found = [method for one in classes for method in vars(one).values()] + list(attributes_of(holder).values())
    for value in found:
        function = value.__func__ if type(value) is MethodType else value
        function = getattr(function, "__wrapped__", function) if type(function) is FunctionType else function
        if type(function) is FunctionType and not is_library(function):
            yield function


def _is_helper(value: Any) -> bool:
    return bool(attributes_of(value)) and not issubclass(type(value), type) and not is_library(type(value))


def _locks(value: Any) -> bool:
    if issubclass(type(value), (*_REENTRANT, type)) or str(type(value).__module__).startswith("logging"):
        return False
    return all(callable(getattr(type(value), name, None)) for name in ("acquire", "release"))
