"""How an argument such as ``strength`` shortens a request, as the pipeline's own source has it."""

from __future__ import annotations

import ast
import inspect
from typing import Any

from steploom.weave import signatures, source_code

_METHOD, _SHARE = "get_timesteps", "strength"
"""What diffusers calls the method that leaves out the first steps, and its argument."""


def shortened(pipeline: Any) -> tuple[str, bool]:
    """The argument of ``__call__`` that says which share of the steps is taken, and whether they are rounded up.

    The argument is "" where there is none.
    """
    call, method = source_code.function(pipeline, "__call__"), source_code.function(pipeline, _METHOD)
    if call is None or method is None or not signatures.takes(getattr(type(pipeline), _METHOD), _SHARE):
        return "", False
    at = list(inspect.signature(getattr(type(pipeline), _METHOD)).parameters).index(_SHARE) - 1  # without self
    for node in ast.walk(call):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", None) == _METHOD:
            given = [keyword.value for keyword in node.keywords if keyword.arg == _SHARE] + node.args[at : at + 1]
            if given and isinstance(given[0], ast.Name):
                return given[0].id, not _rounds_down(method)
    return "", False


def _rounds_down(method: source_code.Function) -> bool:
    """Whether a fraction of a step is left out: ``int(num_inference_steps * strength)``."""
    calls = (node for node in ast.walk(method) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "int")
    products = (node for call in calls for node in call.args if isinstance(node, ast.BinOp))
    return any(isinstance(node.op, ast.Mult) and _SHARE in source_code.names(node) for node in products)
