"""What a program changes in its private tree of a module: attributes of parts, children, parameters, hooks.

GLIGEN turns its gated layers off in the middle of a call, a callback sets the scale of an IP-Adapter. A program that
does so must not share a forward with one that does not, or not yet, though both run clones of the same module.

Two programs that have set equal plain values (also in lists and dicts, and processors of the model library with plain
settings) have done the same. Anything else is its program's alone, who knows what it does. What forwards leave behind
on the tree is no change: it is taken for a cache.
"""

from __future__ import annotations

import itertools
import operator
from collections import OrderedDict
from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from steploom.weave.modules.kept import CONTAINERS, DEEPEST, TABLES, holders

_PLAIN = frozenset((bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device))
_LISTS = (list, tuple)
_DICTS = (dict, OrderedDict)
_TORCHS = frozenset(nn.Module().__dict__) - {"training"}
_ABSENT = object()
_SERIALS = itertools.count(1)


class Switches:
    """Watches a tree of modules for what the program does to it.

    Args:
        tree: As it is shared.
    """

    def __init__(self, tree: nn.Module) -> None:
        self._parts = [_Part(path, module) for path, module in tree.named_modules()]
        self._changes: Hashable = ()
        self._look()

    def changed(self) -> Hashable:
        """What is otherwise than at the start, empty if nothing: equal for trees that were changed alike."""
        if not self._untouched():
            for part in self._parts:
                part.note()
            self._changes = tuple([change for part in self._parts for change in part.changes()])
            self._look()
        return self._changes

    def ran(self) -> None:
        """A forward has run on the tree: what is otherwise since :meth:`changed` is its doing."""
        if not self._untouched():
            for part in self._parts:
                part.settle()
            self._look()

    def _look(self) -> None:
        held = [holder for part in self._parts for holder in holders(part.module)]
        self._values: list[Iterable[Any]] = [one if isinstance(one, list) else one.values() for one in held]
        self._seen = tuple(itertools.chain.from_iterable(self._values))

    def _untouched(self) -> bool:
        """Whether all is the same as it was: cheap, since it is asked at every call."""
        now = tuple(itertools.chain.from_iterable(self._values))
        return len(now) == len(self._seen) and all(map(operator.is_, now, self._seen))


class _Part:
    """A module of the tree, how it was, and what the program did to it."""

    def __init__(self, path: str, module: nn.Module) -> None:
        self.module = module
        self._path = path
        self._was = self._last = _entries(module)
        self._changed: dict[str, Hashable] = {}

    def note(self) -> None:
        """Takes what is otherwise than when it was last looked at for the program's doing."""
        now = _entries(self.module)
        for name in now.keys() | self._last.keys():
            value = now.get(name, _ABSENT)
            if _same(value, self._last.get(name, _ABSENT)):
                continue
            if _same(value, self._was.get(name, _ABSENT)):
                self._changed.pop(name, None)
            else:
                token = _token(value)
                self._changed[name] = token.value if token.plain else ("its own", next(_SERIALS))
        self._last = now

    def settle(self) -> None:
        """Takes what is otherwise than when it was last looked at for a cache."""
        self._last = _entries(self.module)

    def changes(self) -> list[Hashable]:
        """What the program has changed, by name."""
        return [(self._path, name, self._changed[name]) for name in sorted(self._changed)]


class _Token(NamedTuple):
    """What a value is at this moment: equal tokens, equal values.

    Attributes:
        plain: Whether it tells all about the value; else it tells only the very same object.
        value: By kind and content, or by identity.
    """

    plain: bool
    value: Hashable


def _entries(module: nn.Module) -> dict[str, Any]:
    """What can be set on a module, by name. What can be changed in place is there as a token of what it is now."""
    found = {
        name: _token(value) if type(value) in CONTAINERS or name == "processor" else value
        for name, value in module.__dict__.items()
        if name not in _TORCHS
    }
    for table in TABLES:
        entries: dict[Any, Any] = module.__dict__[table]
        if entries:
            found |= {f"{table}.{name}": value for name, value in entries.items()}
    return found


def _same(one: Any, other: Any) -> bool:
    return one is other or _token(one) == _token(other)


def _token(value: Any, depth: int = DEEPEST + 1) -> _Token:
    kind = type(value)
    if kind is _Token:
        return value
    if kind in _PLAIN or value is _ABSENT:
        return _Token(True, (kind, value))
    settings = value if kind in _DICTS else library_settings(value)
    if depth == 0 or (settings is None and kind not in _LISTS):
        return _Token(False, id(value))
    if settings is None:
        return _joined(kind, value, depth)
    token = _joined(kind, itertools.chain.from_iterable(settings.items()), depth)
    return token if token.plain or settings is value else _Token(False, (id(value), token.value))


def _joined(kind: type, values: Iterable[Any], depth: int) -> _Token:
    tokens = [_token(value, depth - 1) for value in values]
    return _Token(all(token.plain for token in tokens), (kind, *(token.value for token in tokens)))


def library_settings(value: Any) -> dict[str, Any] | None:
    """The attributes of an object of the model library's own, such as an attention processor; None of others.

    Settings tell all only of these. A processor that a pipeline brings along (SAG's, which stores attention maps) may
    keep what it has seen: it is equal to itself alone.
    """
    if isinstance(value, (nn.Module, type)) or not type(value).__module__.startswith("diffusers.models."):
        return None
    return getattr(value, "__dict__", None)
