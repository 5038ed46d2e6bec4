"""Whether an object of the application comes to the pipeline, or to another that requests have copies of.

What a function comes to by variables, arguments and attributes is followed, through whatever object. Finding is
general, replacing is not (:mod:`steploom.weave.modules.rebinding`): what is found and cannot be replaced is refused.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import gc
import io
import logging
import socket
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from steploom.weave import untyped

_LIBRARIES = {
    *sys.stdlib_module_names, "steploom", "torch", "torchvision", "diffusers", "transformers", "tokenizers", "peft",
    "accelerate", "safetensors", "huggingface_hub", "numpy", "scipy", "cv2", "PIL", "tqdm",
}  # fmt: skip
"""Modules whose functions and classes know nothing of the application's objects by name; so do installed ones."""
_LOOKED_INTO = ("diffusers", "transformers", *sys.stdlib_module_names)
"""Libraries whose objects hold what the application gave them; those of others are not looked into."""
_PLAIN = {
    type(None), bool, int, float, complex, str, bytes, torch.Tensor, nn.Parameter, torch.dtype, torch.device,
    torch.Size, CodeType,
}  # fmt: skip
"""What refers to nothing, and does not count."""
_STRANGE = (nn.Module, ModuleType, type(threading.Lock()), type(threading.RLock()), io.IOBase, socket.socket)
"""What an object knows, besides pipelines, and is never copied with it."""
_IN_FORWARDS = {"_forward_hooks", "_forward_pre_hooks", "processor", "forward", "encode", "decode"}
"""What runs in the forwards of modules, among their attributes."""
_OF_CLASSES = ("LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")
"""How names are read in the body of a class."""
MOST = 20_000
"""Through how many objects references are followed, from one."""


class TooMany(Exception):
    """An object comes to more others than are looked at."""


class References:
    """What comes to some objects.

    Args:
        sought: Their identities; there may be more of them later, of what comes to these.
        ends: What is not looked into.
    """

    def __init__(self, sought: Collection[int], ends: Iterable[Any] = ()) -> None:
        self._sought = sought
        self._ends = set(map(id, ends))
        self._seen: dict[int, Any] = {}  # they live as long as their identities count
        self._leading: set[int] = set()

    def end_at(self, value: Any) -> None:
        """This is not looked into either."""
        self._ends.add(id(value))

    def lead(self, values: Iterable[Any]) -> bool:
        """Whether one of these is sought, or comes to one that is.

        Raises:
            TooMany: It cannot be told.
        """
        given = [value for value in values if type(value) not in _PLAIN]
        self._follow(given)
        return any(id(value) in self._sought or id(value) in self._leading for value in given)

    def reached(self, values: Iterable[Any]) -> set[int]:
        """What these, and those before them, come to, by identity; not all of it where that is too much."""
        with contextlib.suppress(TooMany):
            self.lead(values)
        return set(self._seen)

    def _follow(self, values: list[Any]) -> None:
        found, counted = values.copy(), 0
        by: dict[int, list[int]] = {}
        leading: list[int] = []
        while found:
            value = found.pop()
            here = id(value)
            if here in self._seen or here in self._ends or here in self._sought:
                continue
            self._seen[here] = value
            held = parts(value)
            counted += bool(held)  # a record of plain values is one itself
            if counted > MOST:
                raise TooMany
            for part in held:
                if id(part) in self._sought or id(part) in self._leading:
                    leading.append(here)
                by.setdefault(id(part), []).append(here)
                found.append(part)
        while leading:
            here = leading.pop()
            if here not in self._leading:
                self._leading.add(here)
                leading += by.get(here, ())


def parts(value: Any) -> list[Any]:
    """What an object refers to, but for plain values; nothing for what is known to hold no such thing."""
    kind = type(value)
    if kind in (dict, tuple) and not gc.is_tracked(value):  # Python's own: all of it is plain
        return []
    return [one for one in _parts(value) if type(one) not in _PLAIN]


def _parts(value: Any) -> Iterable[Any]:
    kind = type(value)
    if kind in weakref.ProxyTypes or issubclass(kind, weakref.ref):
        return [referred(value), *gc.get_referents(value)]
    if kind is FunctionType:
        return _of_function(value)
    if kind is MethodType:
        return [value.__self__, value.__func__]
    if issubclass(kind, type):
        return of_class(value)
    if issubclass(kind, (nn.Module, torch.Tensor, ModuleType, logging.Logger)) or untyped.is_pipeline(value):
        return []
    if is_library(kind) and _top(kind.__module__) not in _LOOKED_INTO:  # hooks, compilers, web applications, loggers
        return []
    held = vars(value).values() if issubclass(kind, threading.local) else ()
    return [*held, *gc.get_referents(value)]


def strangers(value: Any) -> list[Any]:
    """Modules, pipelines, locks and files that an object comes to by attributes, and weak proxies: no part of it."""
    found, seen = parts(value), {id(value): value}
    kept: list[Any] = []
    while found and len(seen) < MOST:
        one = found.pop()
        if id(one) in seen:
            continue
        seen[id(one)] = one
        if type(one) in weakref.ProxyTypes or issubclass(type(one), _STRANGE) or untyped.is_pipeline(one):
            kept.append(one)
        elif not issubclass(type(one), (type, FunctionType, weakref.ref)):
            found += parts(one)
    return kept


def in_forwards(modules: Iterable[nn.Module]) -> set[int]:
    """What hooks, attention processors and replaced forwards of modules come to, by identity: no copies, these."""
    parts_of = (part for module in modules for _, part in nn.Module.named_modules(module))
    held = [part.__dict__[name] for part in parts_of for name in _IN_FORWARDS & part.__dict__.keys()]
    return References(()).reached(one for one in held if type(one) is not OrderedDict or one)


def attributes_read(objects: Iterable[Any]) -> set[str]:
    """Names of attributes, of whatever object, that the methods which an application has given to these use."""
    classes = {id(cls): cls for one in objects for cls in type(one).__mro__ if not is_library(cls)}
    members = [member for cls in classes.values() for member in list(vars(cls).values())]
    members += [getattr(member, "fget", None) or getattr(member, "func", None) for member in members]  # properties
    return {name for one in members if type(one) is FunctionType for name in read_of(one.__code__).attributes}


def referred(weak: Any) -> Any:
    """What a weak reference or proxy is of; None once that is gone."""
    if type(weak) not in weakref.ProxyTypes:
        return weak()
    with contextlib.suppress(ReferenceError, AttributeError):
        return weak.__repr__.__self__
    return None


def _of_function(value: FunctionType) -> list[Any]:
    read = [one for _, one in globals_of(value)]
    read += of_modules(value)
    given = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    return [*read, *(value.__closure__ or ()), *given, *vars(value).values()]


def of_class(cls: type) -> list[Any]:
    """What a class of the application, and those that it is derived from, have."""
    return [one for base in cls.__mro__ if not is_library(base) for one in list(vars(base).values())]


def set_on_libraries(cls: type) -> list[Any]:
    """Functions of the application that are methods of a library's class."""
    members = [one for base in cls.__mro__ if is_library(base) for one in list(vars(base).values())]
    return [one for one in members if type(one) is FunctionType and not is_library(one)]


class Code(NamedTuple):
    """Names that a function, and those within it, use.

    Attributes:
        reads: Global ones.
        sets: Those of them that it sets, or reads in a way that does not ask for them one by one.
        encloses: Those of enclosing functions that it sets.
        attributes: Of whatever object.
        imports: Modules.
    """

    reads: set[str]
    sets: set[str]
    encloses: set[str]
    attributes: set[str]
    imports: set[str]


@functools.lru_cache(maxsize=4096)
def read_of(code: CodeType) -> Code:
    """The names in a function's code."""
    read = Code(set(), set(), set(), set(code.co_names), set())
    for one in dis.get_instructions(code):
        if one.opname == "LOAD_GLOBAL":
            read.reads.add(one.argval)
        elif one.opname in ("STORE_GLOBAL", "DELETE_GLOBAL", *_OF_CLASSES):
            read.sets.add(one.argval)
        elif one.opname in ("STORE_DEREF", "DELETE_DEREF") and one.argval in code.co_freevars:
            read.encloses.add(one.argval)
        elif one.opname == "IMPORT_NAME":
            read.imports.add(one.argval)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            for names, more in zip(read, read_of(inner), strict=True):
                names |= more
    return read


def globals_of(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """The global names that a function of the application reads, and their values."""
    if is_library(function):
        return
    for name in read_of(function.__code__).reads:
        with contextlib.suppress(KeyError):  # a builtin, or set later
            yield name, function.__globals__[name]


def of_modules(function: FunctionType) -> list[Any]:
    """Attributes that a function of the application may read of modules: known by name, or imported."""
    if is_library(function):
        return []
    code, known = read_of(function.__code__), [value for _, value in globals_of(function)]
    known += [sys.modules[name] for name in code.imports if name in sys.modules]
    theirs = [vars(one) for one in known if type(one) is ModuleType and not _of_library(one.__name__)]
    return [members[name] for members in theirs for name in code.attributes & members.keys()]


def is_library(value: Any) -> bool:
    """Whether a function, as it was written (``functools.wraps`` gives it the other's module), or a class is one's."""
    if type(value) is FunctionType:
        return _of_library(value.__globals__.get("__name__"))
    return _of_library(type.__getattribute__(value, "__module__"))  # its own class may have code for this


def _top(module: object) -> str:
    return str(module).partition(".")[0]


def _of_library(module: object) -> bool:
    top = _top(module)
    return top in _LIBRARIES or (top in sys.modules and _is_installed(top))


@functools.lru_cache(maxsize=1024)
def _is_installed(top: str) -> bool:
    """Whether a package lies where packages are installed, and not where applications are written."""
    found = sys.modules[top]
    places = [getattr(found, "__file__", None), *list(getattr(found, "__path__", ()))[:1]]
    return any({"site-packages", "dist-packages"} & set(Path(one).parts) for one in places if one)
