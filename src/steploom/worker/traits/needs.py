"""What a pipeline must be given, as its own check refuses to have none of some arguments, and what it does without."""

from __future__ import annotations

import ast
from typing import Any, TypeGuard

from steploom.weave import signatures, source_code

_CALL, _CHECK = "__call__", "check_inputs"


def needs(pipeline: Any) -> list[list[str]]:
    """Arguments of which at least one must not be None, by ``if a is None and b is None: raise`` in ``check_inputs``.

    Args:
        pipeline: Its source is read; what cannot be read says nothing.

    Returns:
        Lists of names in their order in ``__call__``.
    """
    call, check = source_code.function(pipeline, _CALL), source_code.function(pipeline, _CHECK)
    if call is None or check is None:
        return []
    parameters = signatures.call_parameters(pipeline)
    asked = {name for name in _handed_on(call, check) if name in parameters and parameters[name].default is None}
    found = [_all_none(test) for test in _always_raising(check)]
    wanted = [names for names in found if names and names <= asked]
    return [sorted(names, key=list(parameters).index) for names in dict.fromkeys(wanted)]


def does_without(pipeline: Any, name: str) -> bool:
    """Whether ``__call__`` goes another way where ``name`` is None: ``1 if a is None else 2``, or ``if`` and ``else``.

    One that reads a part of it before that (``a.size``) does not.

    Args:
        pipeline: Or its class. Its source is read; what cannot be read does not.
        name: An argument.
    """
    call = source_code.function(pipeline, _CALL)
    nodes = [] if call is None else list(ast.walk(call))
    ways = [
        node.lineno
        for node in nodes
        if isinstance(node, ast.IfExp) or (isinstance(node, ast.If) and node.orelse)
        if _asks_for(node.test, name) and not _raises(node.body) and not _raises(node.orelse)
    ]
    read = [node.lineno for node in nodes if _is_part_of(node, name)]
    return bool(ways) and all(line >= min(ways) for line in read)


def _asks_for(test: ast.expr, name: str) -> bool:
    """Whether ``test`` is ``name is None`` or its opposite, and nothing else."""
    match test:
        case ast.Compare(left=ast.Name(id=asked), ops=[ast.Is() | ast.IsNot()], comparators=[ast.Constant(value=None)]):
            return asked == name
        case _:
            return False


def _is_part_of(node: ast.AST, name: str) -> TypeGuard[ast.Attribute | ast.Subscript]:
    """Whether ``node`` is ``name.something`` or ``name[something]``, which None has not."""
    part = isinstance(node, ast.Attribute | ast.Subscript)
    return part and isinstance(node.value, ast.Name) and node.value.id == name


def _raises(branch: ast.expr | list[ast.stmt]) -> bool:
    return isinstance(branch, list) and any(isinstance(one, ast.Raise) for one in branch)


def _always_raising(body: source_code.Function) -> list[ast.expr]:
    """The conditions of ``if`` and ``elif`` at the top of ``body`` that raise: whatever else is given."""
    tests: list[ast.expr] = []
    for statement in body.body:
        branch: ast.stmt | None = statement
        while isinstance(branch, ast.If):
            if not any(isinstance(inner, ast.Raise) for inner in branch.body):
                break  # what follows is not asked where this holds
            tests.append(branch.test)
            branch = branch.orelse[0] if len(branch.orelse) == 1 else None
        if any(isinstance(node, ast.Return) for node in ast.walk(statement)):
            break
    return tests


def _all_none(test: ast.expr) -> frozenset[str]:
    """``a is None and b is None`` as the names; empty if it is anything else."""
    terms = test.values if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And) else [test]
    names: set[str] = set()
    for term in terms:
        match term:
            case ast.Compare(left=ast.Name(id=name), ops=[ast.Is()], comparators=[ast.Constant(value=None)]):
                names.add(name)
            case _:
                return frozenset()
    return frozenset(names)


def _handed_on(call: source_code.Function, check: source_code.Function) -> set[str]:
    """Arguments that ``call`` hands to ``check`` under their own names, and as they came."""
    for node in ast.walk(call):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="self"), attr="check_inputs")):
                places = [argument.arg for argument in check.args.args[1:]]
                given = [
                    *zip(places, node.args, strict=False),
                    *((one.arg, one.value) for one in node.keywords if one.arg),
                ]
                same = {name for name, value in given if isinstance(value, ast.Name) and value.id == name}
                changed = [names for names, _, line in source_code.assignments(call) if line < node.lineno]
                return same - set[str]().union(*changed)
            case _:
                pass
    return set()
