"""What a pipeline's own source code says, where it tells in no other way before it has begun to work.

Pipelines refuse sizes and kinds of output in the middle of functions that want everything else first, some of them
after minutes of work. So these functions are read, not called; what cannot be read says nothing.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

Function = ast.FunctionDef

_BUILTINS = {"int": int, "max": max, "min": min, "len": len}


def function(pipeline: Any, name: str) -> Function | None:
    """The source of the method ``name`` of a pipeline or its class; None if it has none, or none that can be read."""
    method = getattr(pipeline if isinstance(pipeline, type) else type(pipeline), name, None)
    return _parsed(method) if callable(method) else None


@functools.lru_cache(maxsize=256)  # siblings of a family inherit from each other
def _parsed(method: Any) -> Function | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, TypeError, SyntaxError):
        return None
    return next((node for node in tree.body if isinstance(node, Function)), None)


def refusals(body: Function) -> Iterator[ast.expr]:
    """The conditions under which ``body`` raises."""
    for node in ast.walk(body):
        if isinstance(node, ast.If) and any(isinstance(inner, ast.Raise) for inner in node.body):
            yield node.test


def names(expression: ast.AST) -> set[str]:
    """The variables in an expression."""
    return {node.id for node in ast.walk(expression) if isinstance(node, ast.Name)}


def assignments(body: Function) -> Iterator[tuple[set[str], ast.expr, int]]:
    """What is assigned in ``body``: to which variables, the value, and in which line."""
    for node in ast.walk(body):
        if isinstance(node, ast.Assign):
            yield set[str]().union(*map(names, node.targets)), node.value, node.lineno


def strings_for(bodies: Iterable[Function], name: str) -> tuple[set[str], set[str]]:
    """The strings with which ``bodies`` compare the variable ``name``: those of which it must be one, and all."""
    needed, known = set[str](), set[str]()
    for body in bodies:
        raising = set(refusals(body))
        for node in ast.walk(body):
            if isinstance(node, ast.Compare) and isinstance(node.left, ast.Name) and node.left.id == name:
                values = [inner.value for other in node.comparators for inner in ast.walk(other)
                          if isinstance(inner, ast.Constant) and isinstance(inner.value, str)]  # fmt: skip
                known.update(values)
                needed.update(values if node in raising and isinstance(node.ops[0], ast.NotIn) else ())
    return needed, known


def handed_to(body: Function, name: str) -> list[str]:
    """The methods, and nested pipelines, of ``self`` that ``body`` calls with the variable ``name``, in order."""
    return [
        node.func.attr
        for node in ast.walk(body)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "self"
        and any(isinstance(v, ast.Name) and v.id == name for v in (*node.args, *(k.value for k in node.keywords)))
    ]


def asks_for_none(body: Function, name: str) -> bool:
    """Whether ``body`` asks if the variable ``name`` is None, or has another value for it then (``name or 64``)."""
    return any(isinstance(one, ast.Name) and one.id == name for node in ast.walk(body) for one in _unsure_of(node))


def _unsure_of(node: ast.AST) -> list[ast.expr]:
    """What an expression takes to be None, maybe."""
    if isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.Is, ast.IsNot)):
        return [node.left]
    return node.values[:1] if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.Or) else []


def values(expression: ast.expr, body: Function, pipeline: Any, beyond: frozenset[str] = frozenset()) -> list[Any]:
    """What ``expression`` may come to in ``body``, as far as it hangs on the pipeline alone.

    Args:
        expression: Part of ``body``.
        body: Where its variables get their values; where branches give several, each counts.
        pipeline: What ``self`` is.
        beyond: Variables that are being looked up already.
    """
    scopes: list[dict[str, Any]] = [{"self": pipeline, **_BUILTINS}]
    for name in sorted(names(expression) - scopes[0].keys()):
        given = [value for targets, value, _ in assignments(body) if targets == {name} and name not in beyond]
        options = [option for value in given for option in values(value, body, pipeline, beyond | {name})]
        scopes = [{**scope, name: option} for scope in scopes for option in options]
    code = compile(ast.Expression(expression), "<pipeline>", "eval")
    found: list[Any] = []
    for scope in scopes:
        with contextlib.suppress(Exception):  # a branch for components that this pipeline does not have
            found.append(eval(code, {"__builtins__": {}}, scope))
    return found
