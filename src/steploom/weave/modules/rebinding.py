"""Functions that the application has set on an object of which programs get copies: they must mean the copy.

``inner = pipe.scheduler.step; pipe.scheduler.step = lambda *a, **k: inner(*a, **k)`` is how steps are usually logged or
changed. ``inner`` is bound to the user's noise scheduler, which no request has set up, and which all would share. So
for a copy such a function is built anew, with the copies in the place of what they were made of, wherever it refers to
that: in its closure, defaults and ``functools.partial``, by global names, as the object of a method, also through other
functions. All else stays the very same: a list that it logs to is the user's, and everybody's.

Where a reference cannot be replaced (within a list, or an attribute of another object), the function is refused.
"""

from __future__ import annotations

import contextlib
import copy
import dis
import functools
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from steploom.errors import ConfigError
from steploom.weave import untyped

_FUNCTIONS = (FunctionType, MethodType, functools.partial)
_LIBRARIES = {
    *sys.stdlib_module_names, "steploom", "torch", "torchvision", "diffusers", "transformers", "tokenizers", "peft",
    "accelerate", "safetensors", "huggingface_hub", "numpy", "scipy", "cv2", "PIL", "tqdm",
}  # fmt: skip
"""Modules whose functions and classes know nothing of the application's objects by name."""
_DEEPEST, _MOST = 8, 2000
"""How far references are followed, and through how many objects."""


_OF_CLASSES = ("LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")
"""How names are read in the body of a class."""


class Rebinding:
    """Copies, and what they are copies of.

    Args:
        copies: By identity of the original.
    """

    def __init__(self, copies: Mapping[int, Any]) -> None:
        self._copies = copies
        self._leaves = set(map(id, copies.values()))
        self._made: dict[int, tuple[Any, Any]] = {}  # the given function, which must live as long as its id counts

    def settle(self, own: Any, name: str) -> None:
        """Has the functions that were set on the original of a copy mean the copy.

        Args:
            own: The copy.
            name: What the application calls the original.

        Raises:
            ConfigError: One cannot; says which, and what to do.
        """
        for attribute, value in functions_of(own).items():
            try:
                own.__dict__[attribute] = self._of(value)
            except _OutOfReach as found:
                raise ConfigError(
                    f"{name}.{attribute} was set on the object, and comes to the pipeline or a part of it through "
                    f"{found}: each request runs on copies of its own, and this would mean yours; set a method, which "
                    f"goes by its self (types.MethodType(f, {name})), define it in a subclass, or have it refer to "
                    "these objects by variables alone"
                ) from None

    def concerns(self, value: Any) -> bool:
        """Whether a function that was set on something of which there is no copy comes to an original."""
        functions = functions_of(value)
        return bool(functions) and self._leads(functions.values())

    def _of(self, value: Any) -> Any:
        """``value`` as it has to be for the copies; itself if it does not come to an original."""
        if id(value) in self._copies:
            return self._copies[id(value)]
        if id(value) in self._made:
            return self._made[id(value)][1]
        if not self._leads([value]):
            return value
        if isinstance(value, MethodType):
            return self._method(value)
        if isinstance(value, functools.partial):
            given = cast("functools.partial[Any]", value)
            made = type(given)(self._of(given.func), *map(self._of, given.args), **self._each(given.keywords))
            vars(made).update(self._each(vars(given)))
            return made
        if isinstance(value, FunctionType):
            uncompiled = vars(value).get("_torchdynamo_orig_callable")  # copies run uncompiled, as those of modules do
            return self._function(value) if uncompiled is None else self._of(uncompiled)
        raise _OutOfReach(f"a {type(value).__name__}")

    def _each(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: self._of(value) for name, value in values.items()}

    def _method(self, given: MethodType) -> Any:
        """The copy's own method of that name, which may be one of a woven class; another one is bound to the copy."""
        function, own = given.__func__, self._of(given.__self__)
        name = getattr(function, "__name__", "")
        theirs = getattr(type(given.__self__), name, None) is function and hasattr(type(own), name)
        if theirs and own is not given.__self__:
            return getattr(type(own), name).__get__(own, type(own))
        return MethodType(self._of(function), own)

    def _function(self, given: FunctionType) -> FunctionType:
        code = _read(given.__code__)
        cells = dict(zip(given.__code__.co_freevars, given.__closure__ or (), strict=True))
        own = {name: CellType() for name, cell in cells.items() if self._leads(_contents(cell))}
        named = {name: value for name, value in _globals(given) if self._leads([value])}
        changed = (code.encloses & own.keys()) | (code.sets if named else set[str]())
        if changed:  # of which it would be alone to know
            raise _OutOfReach(f"a function that sets {min(changed)!r}, a name of its surroundings")
        if any(self._leads(_of_module(value, code)) for _, value in _globals(given)):
            raise _OutOfReach("an attribute of a module")
        names = _Names(given.__globals__) if named else given.__globals__
        closure = tuple(own.get(name, cell) for name, cell in cells.items())
        made = FunctionType(given.__code__, names, given.__name__, None, closure)
        self._made[id(given)] = given, made  # before what it refers to is: that may refer to it
        names.update(self._each(named))
        for name, cell in own.items():
            cell.cell_contents = self._of(cells[name].cell_contents)
        made.__defaults__ = given.__defaults__ and tuple(map(self._of, given.__defaults__))
        made.__kwdefaults__ = given.__kwdefaults__ and self._each(given.__kwdefaults__)
        made.__dict__.update(self._each(vars(given)))
        made.__qualname__, made.__module__, made.__doc__ = given.__qualname__, given.__module__, given.__doc__
        return made

    def _leads(self, values: Iterable[Any]) -> bool:
        """Whether one of these comes to an original, the nearest looked at first."""
        seen: dict[int, Any] = {}
        for _ in range(_DEEPEST):
            found: list[Any] = []
            for value in values:
                if id(value) in self._copies:
                    return True
                if id(value) not in seen and id(value) not in self._leaves and len(seen) < _MOST:
                    seen[id(value)] = value
                    found += _parts(value)
            values = found
        return False


def functions_of(value: Any) -> dict[str, Any]:
    """Functions that were set on an object, and whatever else is called in the place of a method of its class."""
    own = vars(value).items() if hasattr(value, "__dict__") and not isinstance(value, (type, ModuleType)) else ()
    return {name: one for name, one in own if isinstance(one, _FUNCTIONS) or _replaces(value, name, one)}


def settle_parts(copies: Mapping[int, nn.Module]) -> None:
    """Has the functions that were set on the parts of a module mean those of its clone.

    Args:
        copies: The clone's parts, by identity of the original's.
    """
    rebinding = Rebinding(copies)
    for part in copies.values():
        if any(type(value) in _FUNCTIONS for value in part.__dict__.values()):
            rebinding.settle(part, type(part).__name__)


def shallow(value: Any) -> Any:
    """A shallow copy, whose functions mean it."""
    twin = copy.copy(value)
    if functions_of(twin):
        Rebinding({id(value): twin}).settle(twin, type(value).__name__)
    return twin


def unsettled(value: Any, *shared: Any) -> Any:
    """A deep copy, but for the functions that were set on it, which still mean the original, and what is ``shared``."""
    return copy.deepcopy(value, {id(one): one for one in (*shared, *functions_of(value).values())})


class _OutOfReach(Exception):
    """A reference that cannot be replaced, and where it is."""


class _Names(dict[str, Any]):
    """The global names of a function of which some mean a copy: Python asks a dict of another class for the rest."""

    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__({name: value for name, value in given.items() if name.startswith("__")})
        self._given = given

    def __missing__(self, name: str) -> Any:
        return self._given[name]


class _Code(NamedTuple):
    """Names that a function, and those within it, use.

    Attributes:
        reads: Global ones.
        sets: Those of them that it sets, or reads in a way that does not ask :class:`_Names`.
        encloses: Those of enclosing functions that it sets.
        attributes: Of whatever object.
    """

    reads: set[str]
    sets: set[str]
    encloses: set[str]
    attributes: set[str]


@functools.lru_cache(maxsize=4096)
def _read(code: CodeType) -> _Code:
    read = _Code(set(), set(), set(), set(code.co_names))
    for one in dis.get_instructions(code):
        if one.opname == "LOAD_GLOBAL":
            read.reads.add(one.argval)
        elif one.opname in ("STORE_GLOBAL", "DELETE_GLOBAL", *_OF_CLASSES):
            read.sets.add(one.argval)
        elif one.opname in ("STORE_DEREF", "DELETE_DEREF") and one.argval in code.co_freevars:
            read.encloses.add(one.argval)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            for names, more in zip(read, _read(inner), strict=True):
                names |= more
    return read


def _globals(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """The global names that a function of the application reads, and their values."""
    if is_library(function):
        return
    for name in _read(function.__code__).reads:
        with contextlib.suppress(KeyError):  # a builtin, or set later
            yield name, function.__globals__[name]


def _of_module(value: Any, code: _Code) -> list[Any]:
    """Attributes that a function may read of a module of the application."""
    if not isinstance(value, ModuleType) or value.__name__.partition(".")[0] in _LIBRARIES:
        return []
    return [vars(value)[name] for name in code.attributes & vars(value).keys()]


def _parts(value: Any) -> list[Any]:
    """What a value refers to; nothing for what is large, or known to hold no such thing."""
    if isinstance(value, FunctionType):
        code, read = _read(value.__code__), [one for _, one in _globals(value)]
        read += [one for module in read for one in _of_module(module, code)]
        cells = [one for cell in value.__closure__ or () for one in _contents(cell)]
        return [*read, *cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(), *_held(value)]
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, functools.partial):
        given = cast("functools.partial[Any]", value)
        return [given.func, *given.args, *given.keywords.values(), *_held(given)]
    if isinstance(value, dict):
        return list(cast("dict[Any, Any]", value).values())
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(cast("Iterable[Any]", value))
    if isinstance(value, weakref.ref):
        return [cast("weakref.ref[Any]", value)()]
    if isinstance(value, (nn.Module, torch.Tensor, ModuleType)) or untyped.is_pipeline(value):
        return []
    if isinstance(value, type) and is_library(value):
        return []
    return _held(value)


def _held(value: Any) -> list[Any]:
    return list(vars(value).values()) if hasattr(value, "__dict__") else []


def _contents(cell: CellType) -> list[Any]:
    """What a closure's variable holds: nothing, before it is set."""
    with contextlib.suppress(ValueError):
        return [cell.cell_contents]
    return []


def is_library(value: Any) -> bool:
    """Whether a function, as it was written (``functools.wraps`` gives it the other's module), or a class is one's."""
    module = value.__globals__.get("__name__") if isinstance(value, FunctionType) else value.__module__
    return str(module).partition(".")[0] in _LIBRARIES


def _replaces(value: Any, name: str, one: Any) -> bool:
    if not callable(one) or isinstance(one, (type, nn.Module)):
        return False
    return callable(getattr(type(value), name, None))
