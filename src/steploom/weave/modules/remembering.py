"""Application code in a model that keeps something from call to call: TeaCache, first-block caches, counting hooks.

``self.cnt += 1`` and ``self.previous_residual = ...`` in a ``forward`` that the application has written, or set on a
class or an object, mean one pipeline call that runs alone. Nothing tells by what such a forward returns, not even when
it is repeated. So the code is read, as it was compiled: what it sets on the module, each program has on a tree of its
own, and what it sets in its surroundings (a closure, a global) and reads again cannot be had twice, and is refused.
The code of libraries is not read: their caches do not change what comes out.
"""

from __future__ import annotations

import collections
import contextlib
import dis
import functools
import itertools
from collections.abc import Iterator, Sequence
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from steploom.errors import ConfigError
from steploom.weave.modules.references import is_library

_CHANGERS = frozenset(("append", "appendleft", "extend", "insert", "clear", "update", "add", "remove"))
_TAKERS = frozenset(("pop", "popleft", "setdefault"))
"""Methods that change a container, and those that also answer what was in it."""
_CONTAINERS = (dict, list, set, collections.deque)
_AROUND = ("LOAD_DEREF", "LOAD_GLOBAL")
_SILENT = frozenset(("RESUME", "COPY_FREE_VARS", "PUSH_NULL", "PRECALL", "CACHE", "NOP"))
_MODELS = frozenset(("transformers_modules", "diffusers_modules", "bitsandbytes", "torchao", "optimum", "quanto", "hqq",
                     "gptqmodel", "xformers", "flash_attn"))  # fmt: skip
"""Code of models and layers, as their authors wrote it, beside that of libraries: it keeps weights, tables, masks."""
_MOST = 200
"""How many functions are read for one part of a module."""


class _Kept(NamedTuple):
    """What a function keeps from call to call.

    Attributes:
        own: An attribute that it sets, as far as the code tells on the module.
        outside: A name of its surroundings that it sets, and reads again.
    """

    own: str | None
    outside: str | None


def remembers(name: str, module: nn.Module) -> str | None:
    """Why each program needs a tree of its own of this module; None if calls leave nothing behind that counts.

    Args:
        name: The component's name in the pipeline.
        module: The denoiser, as the application gave it.

    Raises:
        ConfigError: What is left behind is out of reach; says where, and what to do.
    """
    why, read = None, set[tuple[int, type]]()
    for part in module.modules():
        for entry, is_hook in _entries(part):
            for function in _reached(entry, part, read):
                kept = _Kept(None, None) if is_hook and _says_nothing(function) else _kept(function, part)
                if kept.outside is not None:
                    raise ConfigError(_refusal(name, part, function, kept.outside))
                if kept.own is not None and why is None:
                    why = f"{function.__qualname__} keeps {kept.own!r} on the module from call to call"
    return why


def is_patched(part: nn.Module) -> bool:
    """Whether a ``forward`` on a part of a module is the application's own doing, and no library's hook."""
    forward: Any = part.__dict__["forward"]
    function = getattr(forward, "__func__", forward)
    hooked = "_hf_hook" in part.__dict__ or "_diffusers_hook" in part.__dict__
    return isinstance(function, FunctionType) and not hooked and not _is_library(function)


def _refusal(name: str, part: nn.Module, function: FunctionType, outside: str) -> str:
    return (
        f"{name}: {function.__qualname__}, which runs in calls of a {type(part).__name__}, keeps what it has seen "
        f"in {outside!r}, which all requests would have in common; keep it in attributes of the module, of which each "
        "request then has its own, or, if this is a cache, do without and give requests cache='easycache:0.1'"
    )


def _entries(part: nn.Module) -> Iterator[tuple[Any, bool]]:
    """What runs in each call of a part: its ``forward``, and the hooks; and whether it is one of these."""
    yield part.__dict__.get("forward"), False
    yield getattr(type(part), "forward", None), False
    for table in ("_forward_pre_hooks", "_forward_hooks"):
        yield from ((hook, True) for hook in part.__dict__[table].values())


def _reached(entry: Any, part: nn.Module, read: set[tuple[int, type]]) -> Iterator[FunctionType]:
    """The application's functions that a call comes to: itself, by its closure, global names and methods."""
    waiting = [entry]
    while waiting:
        value = waiting.pop()
        if isinstance(value, MethodType):
            value = value.__func__
        elif isinstance(value, functools.partial):
            waiting.append(value.func)
        if not isinstance(value, FunctionType) or (id(value), type(part)) in read:
            continue
        read.add((id(value), type(part)))
        waiting += dict(_cells(value)).values()
        if not _is_library(value):
            yield value
            names = _names(value.__code__)
            waiting += [value.__globals__.get(one) for one in names]
            waiting += [getattr(type(part), one, None) for one in names if not one.startswith("__")]


def _is_library(function: FunctionType) -> bool:
    return is_library(function) or str(function.__globals__.get("__name__")).partition(".")[0] in _MODELS


def _around(function: FunctionType) -> dict[str, Any]:
    """What the names of a function's surroundings mean."""
    return {**function.__globals__, **dict(_cells(function))}


def _cells(function: FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # not set yet
            yield name, cell.cell_contents


@functools.lru_cache(maxsize=1024)
def _names(code: CodeType) -> frozenset[str]:
    return frozenset(name for one in _codes(code) for name in one.co_names)


def _codes(code: CodeType) -> Iterator[CodeType]:
    """The code of a function, and of those within it."""
    yield code
    for one in code.co_consts:
        if isinstance(one, CodeType):
            yield from _codes(one)


def _says_nothing(function: FunctionType) -> bool:
    """Whether a hook leaves the output as it is: it returns None, or what a change of a container does."""
    steps = [one for one in dis.get_instructions(function) if one.opname not in _SILENT]
    constant = [one.argval for one in steps if one.opname == "RETURN_CONST"]
    return _is_one_change(steps, _around(function)) or (
        not any(constant)
        and all(
            before.opname == "LOAD_CONST" and before.argval is None
            for before, one in itertools.pairwise(steps)
            if one.opname == "RETURN_VALUE"
        )
    )


def _is_one_change(steps: Sequence[dis.Instruction], around: dict[str, Any]) -> bool:
    """Whether it is ``lambda ...: seen.append(...)`` and no more, where ``seen`` is a container: that returns None."""
    if len(steps) < 4 or any("JUMP" in one.opname for one in steps):
        return False
    name, method, *_, last, _end = steps
    changes = name.opname in _AROUND and isinstance(around.get(name.argval), _CONTAINERS) and method.argval in _CHANGERS
    return changes and last.opname.startswith("CALL")


def _kept(function: FunctionType, part: nn.Module) -> _Kept:
    """What a function keeps: sets on the module, or sets around it and reads again."""
    around = _around(function)
    uses: dict[str, _Uses] = {}
    own: str | None = None
    for code in _codes(function.__code__):
        steps = [one for one in dis.get_instructions(code) if one.opname != "PUSH_NULL"]
        for place, step in enumerate(steps):
            name, after = step.argval, steps[place + 1 : place + 3]
            if step.opname in _AROUND and _is_state(around.get(name, step)):
                uses.setdefault(name, _Uses()).note(around[name], after)
            elif step.opname == "STORE_GLOBAL" or (step.opname == "STORE_DEREF" and name in around):
                uses.setdefault(name, _Uses()).set(in_place=_is_in_place(steps[place - 1]))
            elif step.opname in ("STORE_ATTR", "DELETE_ATTR"):
                own = own if _is_around(steps[place - 1], around) else own or name
            elif step.opname == "LOAD_ATTR" and not _is_around(steps[place - 1], around):
                held = getattr(part, name, None)
                if held is not None and _sets(held, after):
                    if _is_foreign(held):
                        return _Kept(own, name)
                    own = own or name
    return _Kept(own, next((name for name, one in uses.items() if one.writes and one.reads > 0), None))


class _Uses:
    """How a function uses a name of its surroundings."""

    def __init__(self) -> None:
        self.writes = self.reads = 0

    def note(self, value: Any, after: Sequence[dis.Instruction]) -> None:
        """It is loaded, to be read, or to be changed."""
        sets = _sets(value, after)
        self.writes += sets
        self.reads += not sets or after[0].argval in _TAKERS

    def set(self, *, in_place: bool) -> None:
        """It is set; ``in_place`` by ``+=``, for which it was loaded."""
        self.writes += 1
        self.reads -= in_place


def _sets(value: Any, after: Sequence[dis.Instruction]) -> bool:
    """Whether ``value``, which was loaded, is changed by what comes next: a part of it is set, or a method called."""
    first, second = [*after, *after[-1:]][:2]
    if first.opname in ("STORE_ATTR", "DELETE_ATTR", "COPY"):
        return True
    if first.opname in ("LOAD_METHOD", "LOAD_ATTR") and first.argval in _CHANGERS | _TAKERS:
        return not isinstance(value, torch.Tensor)  # whose add() leaves it as it is
    return first.opname.startswith("LOAD_") and second.opname in ("STORE_SUBSCR", "DELETE_SUBSCR", "COPY")


def _is_in_place(step: dis.Instruction) -> bool:
    return step.opname == "BINARY_OP" and step.argrepr.endswith("=")


def _is_around(step: dis.Instruction, around: dict[str, Any]) -> bool:
    """Whether a step loads an object of a function's surroundings, which is not part of the model."""
    return step.opname in _AROUND and _is_state(around.get(step.argval, step))


def _is_state(value: Any) -> bool:
    return not isinstance(value, (FunctionType, MethodType, ModuleType, nn.Module, dis.Instruction))


def _is_foreign(value: Any) -> bool:
    """Whether it is an object of the application, of which a clone of the module has no copy."""
    return not isinstance(value, (nn.Module, type)) and hasattr(value, "__dict__") and not is_library(type(value))
