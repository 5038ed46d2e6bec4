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
from collections.abc import Generator, Iterable, Mapping
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any, cast

from torch import nn

from steploom.errors import ConfigError
from steploom.weave import untyped
from steploom.weave.modules.rebuilding import NotRebuilt, attributes_of, rebuilt
from steploom.weave.modules.references import (
    MOST,
    References,
    TooMany,
    attributes_read,
    globals_of,
    in_forwards,
    of_modules,
    read_of,
    referred,
    strangers,
)

_FUNCTIONS = (FunctionType, MethodType, functools.partial)
_OURS = "_steploom"
_SAID = 8
"""How far into an object the place is told where something cannot be replaced."""
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
        self._ours = set(map(id, ends))
        self._path: list[str] = []
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
        with self._refused(name, "__class__"):
            leads = whole and self._state.lead([type(own)])
        if leads:
            raise class_refusal(type(own), name)
        changed: dict[str, Any] = {}
        for attribute, value in list((attributes_of(own) if whole else functions).items()):
            if attribute == _OURS:
                continue
            with self._refused(name, attribute):
                made = self._of(value, self._all if attribute in functions else self._state)
                if made is not value:
                    changed[attribute] = own.__dict__[attribute] = made
        for attribute, made in changed.items():
            with self._refused(name, attribute):
                if self._state.lead([made]):
                    raise _through(made)

    @contextlib.contextmanager
    def _refused(self, name: str, attribute: str) -> Generator[None]:
        """Whatever goes wrong with an attribute, in the application's own code too, is said of it."""
        self._path = [name, attribute]
        try:
            yield
        except _OfClass as found:
            raise class_refusal(found.args[0], self._where()) from None
        except (_OutOfReach, TooMany) as found:
            owner, _, last = self._where().rpartition(".")
            raise _refusal(owner, last, found) from None
        except Exception as fault:
            raise ConfigError(
                f"{self._where()} was set on the object, and cannot be looked through for the pipeline and its parts "
                f"({type(fault).__name__}: {fault}), of which each request has copies of its own: keep it elsewhere "
                "(in a variable, say), or have it hold less"
            ) from fault

    def _where(self) -> str:
        """The attribute that is being looked at, or was as something went wrong."""
        return ".".join(filter(None, self._path[:_SAID]))

    def _of(self, value: Any, sought: References) -> Any:
        """``value`` as it has to be for the copies; itself if it does not come to what is sought."""
        if id(value) in self._copies:
            return self._copies[id(value)]
        if id(value) in self._made:
            return self._made[id(value)][1]
        if id(value) in self._ours or not self._concerns(value, sought):
            return value
        if type(value) is MethodType:
            return self._method(value)
        if issubclass(type(value), functools.partial):
            given = cast("functools.partial[Any]", value)
            made = type(given)(self._own(given.func), *map(self._own, given.args), **self._each(given.keywords))
            vars(made).update(self._each(vars(given)))
            return made
        if type(value) in _WEAK and (whole := self._there(referred(value))) is not None:
            return (weakref.ref if type(value) is weakref.ref else weakref.proxy)(whole)
        if type(value) is FunctionType:
            uncompiled = vars(value).get("_torchdynamo_orig_callable")  # copies run uncompiled, as those of modules do
            return self._function(value) if uncompiled is None else self._own(uncompiled)
        return self._rebuilt(value, sought)

    def _own(self, value: Any) -> Any:
        """What a function refers to, as it has to be for the copies."""
        return self._of(value, self._all)

    def _concerns(self, value: Any, sought: References) -> bool:
        """Whether ``value`` comes to what is sought; an object with functions set on it, whether they come to any."""
        if sought.lead([value]):
            return True
        if sought is self._all or issubclass(type(value), (nn.Module, *_FUNCTIONS)) or untyped.is_pipeline(value):
            return False
        functions = functions_of(value)
        return bool(functions) and self._all.lead(functions.values())

    def _there(self, value: Any) -> Any:
        """What there is already in the place of ``value``, and lives with the copies."""
        return self._copies[id(value)] if id(value) in self._copies else self._made.get(id(value), (None, None))[1]

    def _rebuilt(self, value: Any, sought: References) -> Any:
        """An object of the application, or what it keeps others in: a shallow copy that holds the copies."""
        if self._state.lead([type(value)]):
            raise _OfClass(type(value))
        if id(value) in self._in_forwards and (sought is self._all or self._path[1] in self._read):
            raise _OutOfReach(f"a {type(value).__name__} that a hook or forward of a module has, too, which serves all")
        functions = functions_of(value)

        def part(name: str, one: Any) -> Any:
            self._path.append(name)
            made = self._of(one, self._all if name in functions else sought)
            self._path.pop()  # it stays where it is if that raises
            return made

        def keep(own: Any) -> None:
            self._made[id(value)] = value, own

        try:
            return rebuilt(value, part, keep)
        except NotRebuilt:
            raise _through(value) from None

    @functools.cached_property
    def _in_forwards(self) -> set[int]:
        modules = [vars(own) for own in self._copies.values() if isinstance(own, nn.Module)]
        return in_forwards(own[_OURS].home for own in modules if _OURS in own)

    @functools.cached_property
    def _read(self) -> set[str]:
        """What methods that run for one request read: as it is copied, they would not see what a hook keeps there."""
        pipelines = [own for own in self._copies.values() if untyped.is_pipeline(own)]
        return attributes_read([*pipelines, *(one for own in pipelines for one in vars(own).values())])

    def _each(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: self._own(value) for name, value in values.items()}

    def _method(self, given: MethodType) -> Any:
        """The copy's own method of that name, which may be one of a woven class; another one is bound to the copy."""
        function, own = given.__func__, self._own(given.__self__)
        name = getattr(function, "__name__", "")
        theirs = getattr(type(given.__self__), name, None) is function and hasattr(type(own), name)
        if theirs and own is not given.__self__:
            return getattr(type(own), name).__get__(own, type(own))
        return MethodType(self._own(function), own)

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
            cell.cell_contents = self._own(cells[name].cell_contents)
        made.__defaults__ = given.__defaults__ and tuple(map(self._own, given.__defaults__))
        made.__kwdefaults__ = given.__kwdefaults__ and self._each(given.__kwdefaults__)
        made.__dict__.update(self._each(vars(given)))
        made.__qualname__, made.__module__, made.__doc__ = given.__qualname__, given.__module__, given.__doc__
        return made

    def _leads(self, values: Iterable[Any]) -> bool:
        """Whether one of these comes to an original."""
        return self._all.lead(values)


def functions_of(value: Any) -> dict[str, Any]:
    """Functions that were set on an object, and whatever else is called in the place of a method of its class."""
    if type(value) in _WEAK or issubclass(type(value), (type, ModuleType)):
        return {}
    own = list(attributes_of(value).items())
    return {name: one for name, one in own if issubclass(type(one), _FUNCTIONS) or _replaces(value, name, one)}


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
    try:
        return _deep(value, shared)
    except Exception as why:
        raise _uncopied(value, shared, why) from why


def _deep(value: Any, shared: Iterable[Any]) -> Any:
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


class _OfClass(Exception):
    """A class that comes to an original."""


def _uncopied(value: Any, shared: Iterable[Any], why: Exception) -> ConfigError:
    kind, fault, what = type(value).__name__, f"{type(why).__name__}: {why}", "it"
    for name, one in attributes_of(value).items():
        try:
            _deep(one, shared)
        except Exception:  # noqa: BLE001 - as above
            what = f"its attribute {name!r}"
            break
    return ConfigError(
        f"each request has a copy of the pipeline's {kind}, and {what} cannot be copied ({fault}): keep that elsewhere "
        "or give its class a __deepcopy__; what wraps another object can be of a subclass of that one's class instead"
    )


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
        ", or have it refer to these objects by variables, attributes, and items of lists, dicts and the like alone"
    )


def _is_whole(value: Any) -> bool:
    """Whether all attributes count, and the class: of modules and tokenizers, just the functions."""
    return not issubclass(type(value), nn.Module) and not untyped.is_tokenizer(value)


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
    if not callable(one) or issubclass(type(one), (type, nn.Module)):
        return False
    return callable(getattr(type(value), name, None))
