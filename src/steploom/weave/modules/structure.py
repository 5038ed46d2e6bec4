"""What the application may have changed about a module: everything that decides what it computes, but its weights.

Classes and submodules, methods and hooks set on an object, attention processors, adapters, attributes such as numbers,
flags and words, also in lists and dicts, dtypes and the device. What forwards and pipelines leave behind is no change:
tensors in attributes (``None`` until they are there), and attributes with private names, a class's own bookkeeping.
"""

from __future__ import annotations

import itertools
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from steploom.weave.modules.kept import DEEPEST, holders

_PLAIN = frozenset((bool, int, float, complex, str, bytes, torch.dtype, torch.device))
_TORCHS = frozenset(nn.Module().__dict__) - {"training"}
_TUNERS = ("scaling", "_active_adapter")
"""Attributes that tell a layer with adapters."""
_ODD = (RuntimeError, ValueError, TypeError, AttributeError)
"""What comparing tensors and arrays with others raises."""


class Token:
    """What a module was at one time. Equal tokens: nothing was changed between.

    Attributes:
        steady: Submodules and adapters, which a direct call of the pipeline leaves alone.
        unhooked: Everything but hooks, whose tables clones have in common with their original.
    """

    __slots__ = ("_all", "_hash", "steady", "unhooked")

    def __init__(self, steady: Hashable, passing: Hashable, hooks: Hashable) -> None:
        self.steady = steady
        self.unhooked = (steady, passing)
        self._all = (steady, passing, hooks)
        self._hash = hash(self._all)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Token) and self._hash == other._hash and self._all == other._all)

    def __hash__(self) -> int:
        return self._hash


class ModuleStructure:
    """Watches a tree of modules. Cheap to ask while nothing changes: containers are compared with copies of themselves.

    Args:
        tree: The module.
        tensors: Whether a parameter or buffer that is replaced (not one that is written to) is a change.
    """

    def __init__(self, tree: nn.Module, *, tensors: bool = False) -> None:
        self._tree = tree
        self._tensors = tensors
        self._token: Token | None = None
        self._look()

    def now(self) -> Token:
        """What the module is now."""
        if self._token is not None and self._untouched():
            return self._token
        self._look()
        token, before = Token(*self._facts()), self._token
        self._token = before if before is not None and token == before else token
        return self._token

    @property
    def patched(self) -> bool:
        """Whether a part has a ``forward`` of its own, set on the object: a clone would call the original's."""
        if not self._untouched():
            self._token = None  # it may be another
            self._look()
        return self._patched

    def _look(self) -> None:
        self._parts = list(self._tree.modules())
        self._patched = any("forward" in part.__dict__ for part in self._parts)
        self._classes = list(map(type, self._parts))
        found = {id(one): one for part in self._parts for one in _watched(part)}
        self._holders = list(found.values())
        self._were = [one.copy() for one in self._holders]
        self._tables: list[dict[str, Any]] = [part.__dict__["_parameters"] for part in self._parts]
        if self._tensors and not self._patched:  # offloading replaces buffers whenever it moves them
            self._tables += [part.__dict__["_buffers"] for part in self._parts]
        self._seen = self._tensors_now()

    def _untouched(self) -> bool:
        """Whether all is the same as it was when it was last looked at."""
        try:
            same = self._holders == self._were
        except _ODD:  # a tensor is another: perhaps a cache
            return False
        return same and list(map(type, self._parts)) == self._classes and self._tensors_now() == self._seen

    def _tensors_now(self) -> tuple[Any, ...]:
        """Dtypes, the device of the first one, and, where it matters, which ones they are."""
        held = list(itertools.chain.from_iterable(map(dict.values, self._tables)))
        first: Any = next((one for one in held if one is not None), None)
        kinds = list(map(getattr, held, itertools.repeat("dtype"), itertools.repeat(None)))
        device = None if first is None or self._patched else first.device  # with offloading hooks, they come and go
        return kinds, device, list(map(id, held)) if self._tensors else None

    def _facts(self) -> tuple[Hashable, Hashable, Hashable]:
        steady: list[Hashable] = []
        passing: list[Hashable] = []
        hooks: list[Hashable] = []
        inner: dict[int, Any] = {}
        for part in self._parts:
            inner |= {id(one): one for one in _inner(part)}
            own = part.__dict__
            adapters = any(name in own for name in _TUNERS)
            attributes = tuple(_attributes(part, private=adapters))
            children = tuple([(name, _identity(one)) for name, one in own["_modules"].items() if one is not None])
            steady.append((type(part), children, attributes if adapters else ()))
            passing.append((() if adapters else attributes, tuple(_code([own["forward"]] if "forward" in own else []))))
            hooks.append(tuple(_code([*own["_forward_pre_hooks"].values(), *own["_forward_hooks"].values()])))
        passing += [_fact(settings, DEEPEST) for settings in inner.values()]
        kinds, device, ids = self._seen
        return tuple(steady), (tuple(passing), tuple(kinds), device, ids and tuple(ids)), tuple(hooks)


def _watched(part: nn.Module) -> Iterator[Any]:
    """Where a module has what is compared: not its tables of tensors, whose comparison is work for the device."""
    own = part.__dict__
    tensors = (own["_parameters"], own["_buffers"])
    yield from (one for one in holders(part) if all(one is not table for table in tensors))
    yield from _inner(part)


def _inner(part: nn.Module) -> Iterator[dict[str, Any]]:
    """The settings of what a module has for itself or in common with others."""
    for name in ("config", "processor"):
        value = part.__dict__.get(name)
        if isinstance(settings := getattr(value, "__dict__", None), dict) and not issubclass(type(value), nn.Module):
            yield settings


def _attributes(part: nn.Module, *, private: bool) -> Iterator[Hashable]:
    """Attributes that count, by name."""
    for name, value in part.__dict__.items():
        if name in _TORCHS or name == "forward" or (name.startswith("_") and not private):
            continue
        fact = _fact(value, DEEPEST)
        if fact is not None:
            yield name, fact


def _fact(value: Any, depth: int) -> Hashable:
    """A value by kind and content, else by identity; None if it is, or holds, nothing that counts."""
    kind: type = type(value)
    if value is None or issubclass(kind, torch.Tensor):
        return None
    if kind in _PLAIN:
        return kind, value
    if depth and kind in (dict, OrderedDict):
        pairs = [(_fact(name, depth - 1), _fact(one, depth - 1)) for name, one in value.items()]
        return tuple([pair for pair in pairs if pair[1] is not None]) or None
    if depth and kind in (list, tuple, set, frozenset):
        facts = [fact for one in value if (fact := _fact(one, depth - 1)) is not None]
        return (frozenset(facts) if kind in (set, frozenset) else tuple(facts)) or None
    return _identity(value)


def _code(found: Iterable[object]) -> Iterator[Hashable]:
    """Replaced ``forward`` methods, or hooks; but for those that transformers' models install at their first call."""
    for one in found:
        if not str(getattr(one, "__module__", "")).startswith("transformers."):
            yield _identity(one)


def _identity(value: Any) -> Hashable:
    """Equal if it is of the same object. A module is not kept for it: it may hold gigabytes."""
    return weakref.ref(value) if issubclass(type(value), nn.Module) else _Same(value)


class _Same:
    """Equal if it is of the same object, which it keeps: an address alone may be another's later."""

    __slots__ = ("_value",)

    def __init__(self, value: object) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other._value is self._value

    def __hash__(self) -> int:
        return id(self._value)
