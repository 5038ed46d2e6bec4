"""Functions that the application has set on an object of which programs get copies: they must mean the copy.

``inner = pipe.scheduler.step; pipe.scheduler.step = lambda *a, **k: inner(*a, **k)`` is how steps are usually logged or
changed. ``inner`` is bound to the user's noise scheduler, which no request has set up, and which all would share. So
for a copy such a function is built anew, with the copies in the place of what they were made of, wherever it refers to
that: in its closure, defaults and ``functools.partial``, by global names, as the object of a method, also through other
functions. All else stays the very same: a list that it logs to is the user's, and everybody's.

Other attributes that come to an original are settled likewise: what holds it in an attribute is copied, once for each
copy. Where a reference cannot be replaced, whatever holds it is refused by name:
:mod:`steploom.weave.modules.references` finds more than can be replaced here.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import weakref
from collections.abc import Iterable, Mapping
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any, cast

from torch import nn

from steploom.errors import ConfigError
from steploom.weave import untyped
from steploom.weave.modules.references import (
    MOST,
    References,
    TooMany,
    globals_of,
    of_modules,
    parts,
    read_of,
    referred,
    strangers,
)

_FUNCTIONS = (FunctionType, MethodType, functools.partial)
_OURS = "_steploom"
_WEAK = (weakref.ref, *weakref.ProxyTypes)


class Rebinding:
    """Copies, and what they are copies of.

    Args:
        copies: By identity of the original.
    """

    def __init__(self, copies: Mapping[int, Any]) -> None:
        self._copies = dict(copies)
        ends = list(copies.values())
        self._all = References(self._copies.keys(), ends)
        self._state = References({one for one, own in copies.items() if not isinstance(own, nn.Module)}, ends)
        self._twins: set[int] = set()
        self._made: dict[int, tuple[Any, Any]] = {}  # what was given, which must live as long as its id counts

    def settle(self, own: Any, name: str) -> None:
        """Has what was set on the original of a copy, and comes to it or to another, mean the copies.

        Args:
            own: The copy.
            name: What the application calls the original.

        Raises:
            ConfigError: Something cannot; says what, and what to do.
        """
        functions, whole = functions_of(own), _is_whole(own)
        if whole and self._state.lead([type(own)]):
            raise class_refusal(type(own), name)
        changed: dict[str, Any] = {}
        for attribute, value in list((vars(own) if whole and hasattr(own, "__dict__") else functions).items()):
            if attribute == _OURS:
                continue
            try:
                made = self._of(value) if attribute in functions else self._attribute(value)
            except (_OutOfReach, TooMany) as found:
                raise _refusal(name, attribute, found) from None
            if made is not value:
                changed[attribute] = own.__dict__[attribute] = made
        for attribute, made in changed.items():
            if self._state.lead([made]):
                raise _refusal(name, attribute, _through(made))
        if id(own) in self._twins and self._state.lead(parts(own)):  # by slots, say
            raise _refusal(*_split(name), _through(own))

    def add(self, value: Any, twin: Any) -> None:
        """Takes up one more copy, that is still to be settled."""
        self._copies[id(value)] = twin
        self._twins.add(id(twin))
        self._all.end_at(twin)
        self._state.end_at(twin)

    def concerns(self, value: Any) -> bool:
        """Whether something of which there is no copy comes to an original."""
        if not hasattr(value, "__dict__") or isinstance(value, (type, ModuleType, *_FUNCTIONS, *_WEAK)):
            return False
        try:
            functions = functions_of(value)
            if functions and self._leads(functions.values()):
                return True
            return _is_whole(value) and self._state.lead([value])
        except TooMany:
            return True  # told when it is settled

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
        if type(value) in _WEAK and id(whole := referred(value)) in self._copies:
            return (weakref.ref if type(value) is weakref.ref else weakref.proxy)(self._copies[id(whole)])
        if isinstance(value, FunctionType):
            uncompiled = vars(value).get("_torchdynamo_orig_callable")  # copies run uncompiled, as those of modules do
            return self._function(value) if uncompiled is None else self._of(uncompiled)
        raise _through(value)

    def _attribute(self, value: Any) -> Any:
        """What is set on a copy in the place of ``value``: where that holds an original in an attribute, a copy."""
        if id(value) in self._made:
            return self._made[id(value)][1]
        if untyped.is_tokenizer(value) or isinstance(value, nn.Module):
            return value
        if id(value) not in self._copies and not self._state.lead([value]):
            return value
        if id(value) in self._copies or isinstance(value, _FUNCTIONS) or type(value) in _WEAK:
            return self._of(value)
        try:
            own = copy.copy(value)
        except Exception:  # noqa: BLE001 - of the application: a lock, say, cannot be copied
            raise _through(value) from None
        self._made[id(value)] = value, own
        if type(value) is list:
            own[:] = map(self._attribute, value)
        elif type(value) is dict:
            own.update({name: self._attribute(one) for name, one in own.items()})
        elif own is not value and hasattr(own, "__dict__"):
            vars(own).update({name: self._attribute(one) for name, one in vars(own).items()})
        return own

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
        code = read_of(given.__code__)
        cells = dict(zip(given.__code__.co_freevars, given.__closure__ or (), strict=True))
        own = {name: CellType() for name, cell in cells.items() if self._leads(_contents(cell))}
        named = {name: value for name, value in globals_of(given) if self._leads([value])}
        changed = (code.encloses & own.keys()) | (code.sets if named else set[str]())
        if changed:  # of which it would be alone to know
            raise _OutOfReach(f"a function that sets {min(changed)!r}, a name of its surroundings")
        if self._leads(of_modules(given)):
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
        """Whether one of these comes to an original."""
        return self._all.lead(values)


def functions_of(value: Any) -> dict[str, Any]:
    """Functions that were set on an object, and whatever else is called in the place of a method of its class."""
    if not hasattr(value, "__dict__") or type(value) in _WEAK or isinstance(value, (type, ModuleType)):
        return {}
    own = vars(value).items()
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
    """A deep copy, but for functions that were set on it, which still mean the original, and what is not its own.

    Args:
        value: Of which.
        shared: What else the copy shares. It shares modules and pipelines, which know of it, in any case.
    """
    kept = (*shared, *functions_of(value).values(), *strangers(value))
    return copy.deepcopy(value, {id(one): one for one in kept})


def class_refusal(cls: type, name: str) -> ConfigError:
    """What is raised where the class of an object comes to an original: there is one of it for all copies."""
    return ConfigError(
        f"the class {cls.__name__} of {name} comes to the pipeline, or to what each request has its own copy of, by "
        "variables or attributes of the class: all requests would mean yours; have its methods go by their self (after "
        "pipe.scheduler.owner = pipe, say, self.owner is the request's own pipeline)"
    )


class _OutOfReach(Exception):
    """A reference that cannot be replaced, and where it is."""


def _through(value: Any) -> _OutOfReach:
    return _OutOfReach(f"a {type(value).__name__}")


def _refusal(name: str, attribute: str, found: Exception) -> ConfigError:
    comes = f"comes to the pipeline or a part of it through {found}"
    if isinstance(found, TooMany):
        comes = (
            f"comes to more than {MOST} objects, too many to see whether the pipeline or a part of it is one of them"
        )
    return ConfigError(
        f"{name}.{attribute} was set on the object, and {comes}: each request runs on copies of its own, and this "
        f"would mean yours; set a method, which goes by its self (types.MethodType(f, {name})), define it in a subclass"
        ", or have it refer to these objects by variables alone"
    )


def _split(name: str) -> tuple[str, str]:
    owner, _, attribute = name.rpartition(".")
    return owner, attribute


def _is_whole(value: Any) -> bool:
    """Whether all attributes count, and the class: of modules and tokenizers, just the functions."""
    return not isinstance(value, nn.Module) and not untyped.is_tokenizer(value)


class _Names(dict[str, Any]):
    """The global names of a function of which some mean a copy: Python asks a dict of another class for the rest."""

    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__({name: value for name, value in given.items() if name.startswith("__")})
        self._given = given

    def __missing__(self, name: str) -> Any:
        return self._given[name]


def _contents(cell: CellType) -> list[Any]:
    """What a closure's variable holds: nothing, before it is set."""
    with contextlib.suppress(ValueError):
        return [cell.cell_contents]
    return []


def _replaces(value: Any, name: str, one: Any) -> bool:
    if not callable(one) or isinstance(one, (type, nn.Module)):
        return False
    return callable(getattr(type(value), name, None))
