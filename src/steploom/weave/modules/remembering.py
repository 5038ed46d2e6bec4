"""Application code in a model that keeps something from call to call: TeaCache, first-block caches, counting hooks.

``self.cnt += 1`` and ``self.previous_residual = ...`` in a ``forward`` that the application has written, or set on a
class or an object, mean one pipeline call that runs alone. Nothing tells by what such a forward returns, not even when
it is repeated. So the code is read, as it was compiled: what it sets on the module, and reads again, each program has
on a tree of its own. Where it keeps something elsewhere (a closure, a global, a helper), or may, since it hands that
on, programs run one after another. What is written and never read, or read and never written, keeps nothing.
The code of libraries is not read: their caches do not change what comes out.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Iterator, Sequence
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from steploom.weave.kinds import is_a
from steploom.weave.modules import bytecode, kept
from steploom.weave.modules.bytecode import UNKNOWN, around, attribute, codes, instructions, is_plain, loads, names
from steploom.weave.modules.findings import Findings, Key, Memory
from steploom.weave.modules.references import is_library

_MODELS = frozenset(("transformers_modules", "diffusers_modules", "bitsandbytes", "torchao", "optimum", "quanto", "hqq",
                     "gptqmodel", "xformers", "flash_attn"))  # fmt: skip
"""Code of models and layers, as their authors wrote it, beside that of libraries: it keeps weights, tables, masks."""
_BY_NAME = ("getattr", "hasattr", "setattr", "delattr")
_OUT_OF_SIGHT = ("vars", "globals", "exec", "eval")
_OF_ROWS = ("item", "tolist")
"""Methods of tensors whose answer, of several rows, is not that of one."""


def remembers(module: nn.Module) -> Memory | None:
    """What calls of a denoiser, as the application gave it, leave behind; None if nothing of that counts."""
    findings = Findings()
    for part in module.modules():
        for entry, is_hook in _entries(part):
            read(findings, entry, part, is_hook=is_hook)
    return findings.verdict()


def is_patched(part: nn.Module) -> bool:
    """Whether a ``forward`` on a part of a module is the application's own doing, and no library's hook."""
    forward: Any = part.__dict__["forward"]
    function = getattr(forward, "__func__", forward)
    hooked = "_hf_hook" in part.__dict__ or "_diffusers_hook" in part.__dict__
    return is_a(function, FunctionType) and not hooked and not _is_library(function)


def _entries(part: nn.Module) -> Iterator[tuple[Any, bool]]:
    """What runs in each call of a part: its ``forward``, its attention processor, the hooks; whether it is a hook."""
    yield part.__dict__.get("forward"), False
    yield getattr(type(part), "forward", None), False
    yield part.__dict__.get("processor"), False
    for table in ("_forward_pre_hooks", "_forward_hooks"):
        yield from ((hook, True) for hook in part.__dict__[table].values())


def _is_library(function: FunctionType) -> bool:
    return is_library(function) or str(function.__globals__.get("__name__")).partition(".")[0] in _MODELS


def read(findings: Findings, entry: Any, part: Any, *, is_hook: bool) -> None:
    """Reads what an entry comes to: the application's functions by its closure, global names and ``part``'s methods."""
    try:
        _read(findings, entry, part, is_hook=is_hook)
    except Exception as fault:  # noqa: BLE001 - objects of the application's that raise at any question: recorded
        findings.cannot(part, fault)


def _read(findings: Findings, entry: Any, part: Any, *, is_hook: bool) -> None:
    waiting: list[tuple[Any, Any]] = [(entry, part)]
    looks_on: bool | None = None if is_hook else False
    while waiting:
        value, owner = waiting.pop()
        if is_a(value, functools.partial):
            held = [*value.args, *value.keywords.values()]  # pyright: ignore[reportUnknownVariableType]
            if not all(is_plain(one) or is_a(one, torch.Tensor) for one in held):
                waiting.append((value.func, UNKNOWN))  # pyright: ignore[reportUnknownMemberType]
                continue
            value = value.func  # pyright: ignore[reportUnknownMemberType]
        function, owner = _function(value, owner)
        if function is None:
            continue
        if looks_on is None:
            looks_on = bytecode.says_nothing(function)
        place = (id(function), id(owner), looks_on)
        if place in findings.read:
            continue
        findings.read.add(place)
        known = dict(bytecode.cells(function))
        waiting += [(one, part) for one in known.values() if is_a(one, FunctionType | MethodType)]
        if not _is_library(function):
            _Reader(findings, function, owner, part, looks_on=looks_on or bytecode.passes_on(function)).read()
            called = names(function.__code__)
            waiting += [(function.__globals__.get(one), part) for one in called]
            methods = (inspect.getattr_static(type(owner), one, None) for one in called if not one.startswith("__"))
            waiting += [(getattr(one, "__func__", getattr(one, "fget", one)), owner) for one in methods]


def _function(value: Any, owner: Any) -> tuple[FunctionType | None, Any]:
    """The function that a call of ``value`` runs, and the object that its first argument is."""
    value = getattr(value, "__wrapped__", value) if is_plain(value) and not is_a(value, FunctionType) else value
    if is_a(value, FunctionType):
        return value, owner
    if is_a(value, MethodType) and is_a(value.__func__, FunctionType):
        return value.__func__, value.__self__
    call = getattr(type(value), "__call__", None)  # noqa: B004 - of an object of the application's
    if is_a(call, FunctionType) and not is_a(value, nn.Module | type) and not is_library(type(value)):
        return call, value
    return None, owner


class _Reader:
    """Reads one function.

    Args:
        findings: Takes note.
        function: The application's.
        owner: The object that its first argument is, as far as one knows.
        part: Of the module, in whose calls it runs.
        looks_on: What it comes to does not count: it is, or serves, a hook that returns nothing; or it only passes on.
    """

    def __init__(self, findings: Findings, function: FunctionType, owner: Any, part: Any, *, looks_on: bool) -> None:
        self._ledger, self._function, self._owner, self._part = findings, function, owner, part
        self._looks_on = looks_on
        self._around = around(function)
        self._cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        self._library = _library_names(type(owner)) if is_a(owner, nn.Module) else frozenset[str]()

    def read(self) -> None:
        """Takes note of all that it does."""
        code = self._function.__code__
        defaults = [*(self._function.__defaults__ or ()), *(self._function.__kwdefaults__ or {}).values()]
        if self._owner is UNKNOWN or not all(is_plain(one) or is_a(one, torch.Tensor) for one in defaults):
            self._loses("its arguments")
        first = code.co_varnames[0] if code.co_argcount else None
        for one in codes(code):
            steps = instructions(one)
            if first is not None:
                kind = "LOAD_FAST" if one is code and first not in one.co_cellvars else "LOAD_DEREF"
                self._follow_owner(steps, first, kind)
            for place, step in enumerate(steps):
                self._names(steps, place, step)

    @functools.cached_property
    def _set_beside(self) -> frozenset[str]:
        return _set_globally(self._function)

    def _names(self, steps: Sequence[dis.Instruction], place: int, step: dis.Instruction) -> None:
        """What an instruction says by itself: it names an attribute, or loads or sets something around."""
        name, text = step.opname, str(step.argval)
        if name in ("LOAD_ATTR", "LOAD_METHOD") and (text == "__dict__" or (text in _OF_ROWS and name != "LOAD_ATTR")):
            self._loses(text)
        elif name == "LOAD_ATTR" and steps[place - 1].opname != "COPY":
            self._reads(("attribute", text))
            if "NULL" in step.argrepr and text in _OF_ROWS:
                self._loses(text)
        elif name in ("STORE_ATTR", "DELETE_ATTR") and not self._is_made_here(steps, place):
            self._ledger.writes(("attribute", text), self._function, text, own=self._is_own(steps, place))
            if text in self._library:
                self._ledger.reads(("attribute", text))
        elif name == "STORE_GLOBAL" or (name in ("STORE_DEREF", "DELETE_DEREF") and text in self._cells):
            self._ledger.writes(self._variable(text), self._function, text, own=False)
        elif name == "LOAD_GLOBAL" and text in _BY_NAME:
            self._by_name(text, steps[place + 1 : place + 5])
        elif name == "LOAD_GLOBAL" and text in _OUT_OF_SIGHT:
            self._loses(text)
        elif name == "LOAD_GLOBAL" or (name == "LOAD_DEREF" and text in self._cells):
            self._load(steps, place, text)

    def _load(self, steps: Sequence[dis.Instruction], place: int, name: str) -> None:
        """A variable around it is loaded."""
        value = self._around.get(name)
        at, above = bytecode.taker(steps, place)
        stored = None if at is None or above != 1 or not bytecode.is_in_place(steps[at]) else steps[at + 1]
        counts = stored is not None and stored.opname.startswith("STORE_") and stored.argval == name
        if not counts:  # ``calls += 1``
            self._reads(self._variable(name))
            if name in self._set_beside:
                self._ledger.writes(self._variable(name), self._function, name, own=False)
        if not is_plain(value):
            self._note(steps, bytecode.use(steps, place, value), ("object", id(value)), name, own=False)

    def _follow_owner(self, steps: Sequence[dis.Instruction], name: str, kind: str, seen: tuple[str, ...] = ()) -> None:
        """What is done to the containers and objects that its own object has."""
        for place, above in loads(steps, name, kind):
            at, _ = bytecode.taker(steps, place, above)
            step = None if at is None else steps[at]
            if at is None or step is None:
                continue
            if step.opname == "STORE_FAST" and step.argval not in (name, *seen):
                self._follow_owner(steps, str(step.argval), "LOAD_FAST", (name, *seen))
            elif step.opname in ("STORE_DEREF", "STORE_GLOBAL"):
                self._loses(name)
            elif not step.opname.endswith(("_ATTR", "_METHOD")) and not is_a(self._owner, nn.Module):
                self._loses(name)  # a helper is called, or given to somebody
            held = attribute(self._owner, str(step.argval)) if step.opname in ("LOAD_ATTR", "LOAD_METHOD") else None
            if step.opname == "LOAD_ATTR" and not is_plain(held) and held is not UNKNOWN:
                own = is_a(self._owner, nn.Module) and type(held) in kept.CONTAINERS
                self._note(steps, bytecode.use(steps, at, held), ("content", step.argval), step.argval, own=own)

    def _note(
        self,
        steps: Sequence[dis.Instruction],
        found: bytecode.Use,
        key: Key,
        name: str,
        *,
        own: bool,
        seen: tuple[str, ...] = (),
    ) -> None:
        """Takes note of what becomes of an object, also by its other names."""
        if found.reads:
            self._reads(key)
        if found.writes or (found.escapes and self._looks_on):
            self._ledger.writes(key, self._function, name, own=own)
        if found.keyed:
            self._ledger.keyed(key)
        if found.escapes:
            self._loses(name)
        if found.alias is not None and found.alias not in seen:
            for place, above in loads(steps, found.alias):
                use = bytecode.use(steps, place, found.value, above)
                self._note(steps, use, key, name, own=own, seen=(*seen, found.alias))

    def _is_own(self, steps: Sequence[dis.Instruction], place: int) -> bool:
        """Whether an attribute is set that a tree of one's own has too: of the module, and not within a tensor."""
        code, name = self._function.__code__, steps[place].argval
        first = code.co_argcount > 0 and bytecode.variable(steps, place) == code.co_varnames[0]
        whole = not is_a(attribute(self._owner, name), torch.Tensor) or "SWAP" not in steps[place - 1].opname
        return is_a(self._owner, nn.Module) and first and whole

    def _is_made_here(self, steps: Sequence[dis.Instruction], place: int) -> bool:
        """Whether an attribute is set of what a call has returned, as of an output: not of a part of the module.

        Were that one of what is kept, it would have been followed to there.
        """
        name = bytecode.variable(steps, place)
        stores = [at for at, one in enumerate(steps) if one.opname == "STORE_FAST" and one.argval == name]
        return bool(stores) and all(steps[at - 1].opname.startswith("CALL") for at in stores)

    def _by_name(self, function: str, after: Sequence[dis.Instruction]) -> None:
        """``getattr`` and its like."""
        name = next((one.argval for one in after if one.opname == "LOAD_CONST" and isinstance(one.argval, str)), None)
        if name is None:
            self._loses(function)
        elif function in ("getattr", "hasattr"):
            self._reads(("attribute", name))
        else:
            self._ledger.writes(("attribute", name), self._function, name, own=False)

    def _variable(self, name: str) -> Key:
        cell = self._cells.get(name)
        return ("cell", id(cell)) if cell is not None else ("variable", (id(self._function.__globals__), name))

    def _reads(self, key: Key) -> None:
        if not self._looks_on:
            self._ledger.reads(key)

    def _loses(self, name: str) -> None:
        if not self._looks_on:
            self._ledger.loses(self._function, name)


@functools.lru_cache(maxsize=256)
def _library_names(cls: type) -> frozenset[str]:
    """What the methods of a model's class name that are a library's."""
    known = [one for one in cls.__mro__ if is_library(one) and one not in (nn.Module, object)]
    methods = (inspect.unwrap(one) for cls in known for one in vars(cls).values() if is_a(one, FunctionType))
    return frozenset(name for method in methods for name in names(method.__code__))


def _set_globally(function: FunctionType) -> frozenset[str]:
    """The global names that functions beside this one set, as those do that begin and end something."""
    beside: list[Any] = [one for one in function.__globals__.values() if is_a(one, FunctionType | type)]
    for cls in [one for one in beside if is_a(one, type)]:
        beside += vars(cls).values()
    found = {inspect.unwrap(one) for one in beside if is_a(one, FunctionType)}
    ours = [one.__code__ for one in found if one.__globals__ is function.__globals__]
    return frozenset().union(*map(_stored, ours)) if ours else frozenset()


@functools.lru_cache(maxsize=4096)
def _stored(code: CodeType) -> frozenset[str]:
    every = (step for one in codes(code) for step in instructions(one))
    return frozenset(step.argval for step in every if step.opname == "STORE_GLOBAL")
