"""What a function does with the objects that it finds around it, and on its own object, read from its bytecode.

Each value that is loaded is followed along the stack to the instruction that takes it: that reads it, changes it, or
hands it on to where it is out of sight. What is not understood counts as handed on.
"""

from __future__ import annotations

import contextlib
import dis
import enum
import functools
import inspect
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from steploom.weave.kinds import is_a
from steploom.weave.modules.references import is_library

CONTAINERS = (dict, list, set, deque)
_EXACT = (dict, list, set, deque, OrderedDict, defaultdict, Counter)
_CHANGERS = frozenset(("append", "appendleft", "extend", "insert", "clear", "update", "add", "remove", "discard"))
_TAKERS = frozenset(("pop", "popleft", "popitem", "setdefault"))
"""Methods that change a container, and those that also answer what was in it."""
_LOOKERS = frozenset(("len", "sum", "max", "min", "tuple", "list", "dict", "set", "sorted", "enumerate", "zip", "any",
                      "all", "print", "str", "repr", "bool", "isinstance", "id", "type"))  # fmt: skip
_HARMLESS = frozenset(("logging", "pathlib", "re", "enum", "datetime", "decimal", "typing"))
"""Of the standard library's objects those of these, of libraries' all, but for tensors, arrays and generators, do not
change what a model makes of its inputs."""
_CACHED = type(functools.lru_cache()(len))
_PLAIN = (int, float, complex, str, bytes, type(None), type, FunctionType, MethodType, BuiltinFunctionType, ModuleType,
          torch.dtype, torch.device, nn.Module, enum.Enum, _CACHED)  # fmt: skip
_SILENT = frozenset(
    ("RESUME", "COPY_FREE_VARS", "PUSH_NULL", "CACHE", "NOP", "EXTENDED_ARG", "KW_NAMES", "COPY", "SWAP")
)
_LOOKS = ("GET_ITER", "CONTAINS_OP", "COMPARE_OP", "IS_OP", "UNARY_", "POP_", "TO_BOOL", "FORMAT_", "GET_LEN",
          "LIST_EXTEND", "DICT_", "SET_UPDATE", "UNPACK_", "CALL_FUNCTION_EX", "CALL_INTRINSIC")  # fmt: skip
_GOES_ON = ("STORE_FAST", "STORE_DEREF", "STORE_GLOBAL", "STORE_NAME", "POP_JUMP", "TO_BOOL")
_NO_RESULT = ("STORE_", "POP_", "DELETE_", "RETURN_VALUE", "PRECALL", "RERAISE", "RAISE_")
UNKNOWN = object()
"""What is in a container, or comes of a property."""


class Use(NamedTuple):
    """What becomes of a value that was loaded.

    Attributes:
        reads: What is in it counts for what is computed.
        writes: It is changed.
        escapes: It goes where this is not known.
        alias: The local variable that it is from now on.
        value: What that is: a part of it, perhaps.
        keyed: What it holds by keys is set, and not by a constant one, as in a table of what was found out before.
    """

    reads: bool = False
    writes: bool = False
    escapes: bool = False
    alias: str | None = None
    value: Any = None
    keyed: bool = False


READ, WRITE, ESCAPE = Use(reads=True), Use(writes=True), Use(escapes=True)


@functools.lru_cache(maxsize=1024)
def instructions(code: CodeType) -> tuple[dis.Instruction, ...]:
    """Those of a function, without those that only concern the interpreter."""
    return tuple(one for one in dis.get_instructions(code) if one.opname not in ("CACHE", "EXTENDED_ARG"))


def codes(code: CodeType) -> Iterator[CodeType]:
    """The code of a function, and of those within it."""
    yield code
    for one in code.co_consts:
        if isinstance(one, CodeType):
            yield from codes(one)


@functools.lru_cache(maxsize=1024)
def names(code: CodeType) -> frozenset[str]:
    """Of globals, attributes and methods that a function uses."""
    return frozenset(name for one in codes(code) for name in one.co_names)


def around(function: FunctionType) -> dict[str, Any]:
    """What the names of a function's surroundings mean."""
    return {**function.__globals__, **dict(cells(function))}


def cells(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """The names of its closure, and what they mean."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # not set yet
            yield name, cell.cell_contents


def says_nothing(function: FunctionType) -> bool:
    """Whether it returns nothing but None, or what a change of a container returns."""
    steps = [one for one in instructions(function.__code__) if one.opname not in _SILENT]
    constant = [one.argval for one in steps if one.opname == "RETURN_CONST"]
    ends = [at for at, one in enumerate(steps) if one.opname == "RETURN_VALUE"]
    return _is_one_change(steps, around(function)) or (
        not any(constant) and all(steps[at - 1].opname == "LOAD_CONST" and steps[at - 1].argval is None for at in ends)
    )


def passes_on(function: FunctionType) -> bool:
    """Whether it returns what another function makes of its own arguments, all as they are: it measures that, say."""
    code = function.__code__
    given = inspect.getargs(code)
    if given.args or given.varargs is None or given.varkw is None or len(list(codes(code))) > 1:
        return False
    steps = instructions(code)
    calls = [at for at, one in enumerate(steps) if one.opname == "CALL_FUNCTION_EX"]
    taken = [taker(steps, place, above)[0] for name in given[1:] for place, above in loads(steps, str(name))]
    ends = [at - 1 for at, one in enumerate(steps) if one.opname == "RETURN_VALUE"]
    if len(calls) != 1 or any(at is None or at > calls[0] for at in taken) or len(taken) != 2:
        return False
    if ends == calls:
        return True
    result = steps[calls[0] + 1]
    stores = [one for one in steps if one.opname.startswith("STORE_FAST") and one.argval == result.argval]
    looked = [use(steps, place, UNKNOWN, above) for place, above in loads(steps, str(result.argval))]
    returned = all(steps[at].opname.startswith("LOAD_FAST") and steps[at].argval == result.argval for at in ends)
    return stores == [result] and returned and not any(one.writes or one.alias for one in looked)


def _is_one_change(steps: Sequence[dis.Instruction], known: Mapping[str, Any]) -> bool:
    """Whether it is ``lambda ...: seen.append(...)`` and no more, with a method that returns nothing."""
    if len(steps) < 4 or any("JUMP" in one.opname for one in steps):
        return False
    name, method, *_, last, _end = steps
    if name.opname not in ("LOAD_DEREF", "LOAD_GLOBAL") or not last.opname.startswith("CALL"):
        return False
    value, called = known.get(name.argval), str(method.argval)
    own = inspect.getattr_static(type(value), called, None)
    if is_a(own, FunctionType):
        return says_nothing(own)
    return called in _CHANGERS and is_a(value, CONTAINERS)


def is_plain(value: Any, depth: int = 4) -> bool:
    """Whether nothing can be kept in it: numbers and texts, modules and functions, what libraries offer."""
    if is_a(value, tuple | frozenset):
        return depth > 0 and all(is_plain(item, depth - 1) for item in value)  # pyright: ignore[reportUnknownVariableType]
    if is_a(value, _PLAIN):
        return True
    if is_a(value, (*CONTAINERS, torch.Tensor, torch.Generator)):
        return False
    kind = type(value)
    if kind.__name__ in ("ndarray", "Generator", "RandomState"):
        return False
    top = kind.__module__.partition(".")[0]
    return top in _HARMLESS or (top not in sys.stdlib_module_names and is_library(kind))


def holds_plain(value: Any) -> bool:
    """Whether it is a container of what is plain."""
    if type(value) not in _EXACT:  # whose items need none of the application's code
        return False
    return all(map(is_plain, value.values() if is_a(value, dict) else value))


def loads(steps: Sequence[dis.Instruction], name: str, kind: str = "LOAD_FAST") -> Iterator[tuple[int, int]]:
    """Where a local variable is loaded (of ``kind`` another one), and how much lies above it then."""
    for place, step in enumerate(steps):
        given = step.argval if isinstance(step.argval, tuple) else (step.argval,)  # two at once, from Python 3.13 on
        if kind in step.opname and given[-1] == name:
            yield place, 0
        if kind in step.opname and len(given) == 2 and given[0] == name and step.opname.startswith("LOAD"):
            yield place, 1


def variable(steps: Sequence[dis.Instruction], place: int) -> str | None:
    """The variable of whose value the instruction at ``place`` sets an attribute; None if it is of something else's."""
    given = [at for at in range(place) if "LOAD" in steps[at].opname and taker(steps, at) == (place, 0)]
    name = (
        steps[given[-1]].argval
        if given and not steps[given[-1]].opname.startswith(("LOAD_ATTR", "LOAD_CONST"))
        else None
    )
    return str(name[-1] if isinstance(name, tuple) else name) if name is not None else None


def _is_table(value: Any) -> bool:
    """Whether it is given to functions as a list of numbers, or of layers, is: to be looked at."""
    return holds_plain(value) and len(value) > 0


def use(steps: Sequence[dis.Instruction], place: int, value: Any, above: int = 0) -> Use:
    """What becomes of ``value``, which the instruction at ``place`` has loaded, and so much above it."""
    reads = False
    while True:
        at, above = taker(steps, place, above)
        if at is None:
            return ESCAPE
        found, value = _taken_by(steps, at, above, place, value)
        if found is not None:
            return found._replace(reads=found.reads or (reads and not found.writes))
        reads, place, above = True, at, 0


def is_in_place(step: dis.Instruction) -> bool:
    """Whether it is ``+=`` or the like."""
    return step.opname == "BINARY_OP" and step.argrepr.endswith("=")


def _taken_by(steps: Sequence[dis.Instruction], at: int, above: int, place: int, value: Any) -> tuple[Use | None, Any]:
    """What the instruction at ``at`` does with ``value``; None if what it makes of it is to be followed."""
    step = steps[at]
    name = step.opname
    if name in ("LOAD_ATTR", "LOAD_METHOD"):
        if name == "LOAD_METHOD" or "NULL" in step.argrepr:
            return _method(value, step.argval), None
        held = attribute(value, step.argval)
        return (READ, None) if held is not UNKNOWN and is_plain(held) else (None, held)
    if name in ("STORE_SUBSCR", "DELETE_SUBSCR", "STORE_ATTR", "DELETE_ATTR"):
        keyed = name.endswith("SUBSCR") and steps[at - 1].opname != "LOAD_CONST"
        return (WRITE._replace(keyed=keyed) if above == name.endswith("SUBSCR") else ESCAPE), None
    if name.startswith("BINARY_S") or step.argrepr == "[]":
        return (READ, None) if above == 0 or holds_plain(value) else (None, UNKNOWN)
    if name == "BINARY_OP":
        return Use(reads=True, writes=is_in_place(step) and above == 1), None
    if name == "STORE_FAST":
        return Use(alias=str(step.argval), value=value), None
    if name.endswith("_OR_POP"):
        return ESCAPE, None
    if name.startswith(_LOOKS) or "JUMP" in name or _looks(steps, place, name) or ("CALL" in name and _is_table(value)):
        return READ, None
    return (READ if value is UNKNOWN or is_a(value, torch.Tensor) else ESCAPE), None


def _looks(steps: Sequence[dis.Instruction], place: int, taker: str) -> bool:
    """Whether it is the one argument of a builtin that only looks at it."""
    before = [one for one in steps[max(0, place - 2) : place] if one.opname != "PUSH_NULL"]
    return "CALL" in taker and bool(before) and before[-1].opname == "LOAD_GLOBAL" and before[-1].argval in _LOOKERS


def _method(value: Any, name: str) -> Use:
    """What a call of a method does with its object."""
    if value is UNKNOWN or is_a(value, torch.Tensor):
        changes = name.endswith("_") and not name.endswith("__")
        return WRITE if changes or (value is UNKNOWN and name in _CHANGERS | _TAKERS) else READ
    if type(value) in _EXACT:
        return Use(reads=name not in _CHANGERS, writes=name in _CHANGERS | _TAKERS)
    return ESCAPE


def attribute(value: Any, name: str) -> Any:
    """An attribute, without running any code for it; unknown where that would be needed."""
    if value is UNKNOWN:
        return UNKNOWN
    if is_a(value, nn.Module):
        for table in ("_parameters", "_buffers", "_modules"):
            if name in value.__dict__.get(table, ()):
                return value.__dict__[table][name]
    found = inspect.getattr_static(value, name, None)
    return UNKNOWN if is_a(found, property) or inspect.isdatadescriptor(found) else found


def taker(steps: Sequence[dis.Instruction], place: int, above: int = 0) -> tuple[int | None, int]:
    """The instruction that takes what the one at ``place`` has pushed, and how much lies above it then."""
    for at in range(place + 1, len(steps)):
        step = steps[at]
        if step.opname == "SWAP":
            depth = (step.arg or 0) - 1
            above = depth if above == 0 else 0 if above == depth else above
            continue
        if step.opname == "COPY" and step.arg == above + 1 and steps[at + 1].opname.startswith(_GOES_ON):
            return None, 0  # it has another name from now on, or stays if it is true
        if _pops(step) > above:
            return at, above
        if step.opname in ("JUMP_FORWARD", "JUMP_BACKWARD", "JUMP_IF_TRUE_OR_POP", "JUMP_IF_FALSE_OR_POP"):
            return None, 0
        above += _effect(step)
    return None, 0


def _effect(step: dis.Instruction) -> int:
    has_argument = step.opcode >= dis.HAVE_ARGUMENT if sys.version_info < (3, 12) else step.opcode in dis.hasarg
    return dis.stack_effect(step.opcode, step.arg if has_argument else None, jump=False)


def _pops(step: dis.Instruction) -> int:
    """How many values it takes from the stack; rather one too many, which counts as taken by what is not understood."""
    name = step.opname
    if name in ("LOAD_ATTR", "LOAD_METHOD", "BEFORE_WITH", "UNPACK_SEQUENCE"):
        return 1
    if name == "LOAD_SUPER_ATTR":
        return 3
    if name in _SILENT or name.startswith("LOAD_") or name == "FOR_ITER":
        return 0
    effect = _effect(step)
    return -effect if name.startswith(_NO_RESULT) or "JUMP" in name else 1 - effect
