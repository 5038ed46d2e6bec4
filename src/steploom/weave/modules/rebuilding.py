"""Shallow copies of an application's objects and containers, of which some parts are others.

``copy.copy`` asks the object (``__copy__``, ``__reduce__``, ``__getattr__``, which may raise or lie), and what is in a
slot, a key or a tuple could not be replaced afterwards. Here none of the object's own code runs, but for hashes.
"""

from __future__ import annotations

import functools
import gc
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from types import GetSetDescriptorType, MappingProxyType, MemberDescriptorType, SimpleNamespace
from typing import Any

_BASES: tuple[Any, ...] = (
    OrderedDict, defaultdict, dict, deque, list, set, frozenset, tuple, SimpleNamespace, object,
)  # fmt: skip
"""What Python keeps in objects of these, or of classes derived from one, is known; the first that fits counts."""
_TABLES = 2
"""Pointers of an object that are no slots: to its attributes, and to its weak references."""


class NotRebuilt(Exception):
    """An object holds more than attributes, slots and items: it is written in C, say."""


def rebuilt(value: Any, part: Callable[[str, Any], Any], keep: Callable[[Any], None]) -> Any:
    """An object of the same class.

    Args:
        value: Of which.
        part: What is in the place of an attribute of this name, or of an item, whose name is "".
        keep: Is told of the object, as soon as there is one: its parts may lead back to it.

    Raises:
        NotRebuilt: It is of no such kind.
    """
    kind = type(value)
    if kind is MappingProxyType:
        return MappingProxyType(part("", gc.get_referents(value)[0]))
    base = next(one for one in _BASES if issubclass(kind, one))
    slots = _slots(kind)
    if kind.__basicsize__ > base.__basicsize__ + tuple.__itemsize__ * (len(slots) + _TABLES):
        raise NotRebuilt
    items: list[Any] = []
    if base in (tuple, frozenset):
        items = [part("", one) for one in base.__iter__(value)]
    try:
        made = _undying(kind)
        own = base.__new__(made, items) if items else base.__new__(made)
    except TypeError:  # it takes more to make one
        raise NotRebuilt from None
    keep(own)
    _fill(own, value, base, part)
    attributes = attributes_of(value)
    attributes_of(own).update({name: part(name, one) for name, one in list(attributes.items())})
    for slot in slots:
        try:
            held = slot.__get__(value, kind)
        except AttributeError:  # it is not set
            continue
        slot.__set__(own, part(slot.__name__, held))
    return own


@functools.lru_cache(maxsize=1024)
def _undying(kind: type) -> Any:
    """The class; or one that does nothing as an object of it goes: it has what it would close in common with others."""
    if not hasattr(kind, "__del__"):
        return kind
    members = {"__slots__": (), "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind)(kind.__name__, (kind,), {**members, "__del__": lambda self: None})  # pyright: ignore


def attributes_of(value: Any) -> dict[str, Any]:
    """An object's own attributes, whatever it says about them; those of slots are not among them."""
    for base in type.__getattribute__(type(value), "__mro__"):  # asking it might run code of its own
        found = base.__dict__.get("__dict__")
        if isinstance(found, GetSetDescriptorType | MemberDescriptorType):
            attributes = found.__get__(value)
            return attributes if isinstance(attributes, dict) else {}
    return {}


def _slots(kind: type) -> list[Any]:
    members = [one for base in kind.__mro__ for one in list(vars(base).values())]
    return [one for one in members if type(one) is MemberDescriptorType and one.__name__ != "__dict__"]


def _fill(own: Any, value: Any, base: Any, part: Callable[[str, Any], Any]) -> None:
    """Gives a container its items; those that never change have them."""
    if issubclass(base, dict):
        for key, one in list(base.items(value)):
            base.__setitem__(own, part("", key), part("", one))
    elif base in (list, set, deque):
        settings = (deque.maxlen.__get__(value),) if base is deque else ()  # pyright: ignore[reportAttributeAccessIssue]
        base.__init__(own, [part("", one) for one in list(base.__iter__(value))], *settings)
