"""The rest of a pipeline's code: what it does between the end of a step and the call of its decoder.

How latents become pictures is written in the pipeline's ``__call__`` alone: unpacking, statistics of the VAE, masks,
the frames that were given. So a preview does not imitate it but runs it: the code that comes after the suspended
``scheduler.step(...)`` is compiled from the pipeline's source and run on copies of the suspended frame's variables, as
if the step had been the last one and had ended at the estimate of x0. It is a small program of its own, which stops at
the module call that would decode.
"""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import itertools
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from steploom.weave import untyped
from steploom.weave.calls import ModuleCall
from steploom.weave.modules.rebinding import shallow
from steploom.weave.pipelines import detached
from steploom.weave.program import Program
from steploom.weave.watching import Watcher

_RESULT = "_steploom_result"
DEEPEST = 6
"""How deep lists, dicts and caches in a variable are taken apart: a cache's layers are in a list."""

_SILENCED = {"callback": None, "callback_on_step_end": None, "output_type": "pil"}
"""Variables of a pipeline's call that its rest sees otherwise: nobody is called back, and it decodes."""


def decoder_call(program: Program, result: Any) -> ModuleCall | None:
    """The call of a decoder that ``program`` would come to if the step that it stands in had returned ``result``.

    Returns:
        The call, not executed; None where the rest of the pipeline's call decodes nothing.

    Raises:
        Exception: The rest of the pipeline's call cannot be run.
    """
    frames = list(_frames(program.frame))
    if not frames:
        return None
    pipeline = detached(frames[0].f_locals["self"])
    preview = Program("preview", functools.partial(_run, frames, pipeline, result), Watcher())
    device = pipeline._steploom[2]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        preview.resume()
    try:
        if preview.error is not None:
            raise preview.error
        return preview.call if preview.call is not None and preview.call.target.method == "decode" else None
    finally:
        preview.unwind()
        _let_go(frames)


def _frames(frame: types.FrameType | None) -> Iterator[types.FrameType]:
    """The frames of the innermost pipeline's own methods, from the inside: a cascade's stage ends where it returns."""
    own: Any = None
    while frame is not None:
        self = frame.f_locals.get("self") if "self" in frame.f_code.co_varnames[:1] else None
        if untyped.is_pipeline(self) and (own is None or self is own):
            own = self
            yield frame
        elif untyped.is_pipeline(self):
            return
        frame = frame.f_back


def _let_go(frames: Sequence[types.FrameType]) -> None:
    """Drops the snapshots of variables that reading them has left with the frames (until Python 3.12)."""
    for frame in frames:
        snapshot: Any = frame.f_locals
        if type(snapshot) is dict:
            snapshot.clear()


def _run(frames: Sequence[types.FrameType], pipeline: Any, value: Any) -> Any:
    """Runs the rest of each frame in turn, each on what the one inside it returns."""
    for frame in frames:
        rest = _rest(frame.f_code, frame.f_lasti)
        known = {name: _own(value, cloned=name in rest.changed) for name, value in frame.f_locals.items()}
        known |= {name: other for name, other in _SILENCED.items() if name in known}
        known |= {"self": pipeline, _RESULT: value}
        if isinstance(known.get("i"), int) and hasattr(known.get("timesteps"), "__len__"):
            known["i"] = len(known["timesteps"]) - 1
        values = {name: value for name, value in known.items() if name in rest.names}
        value = types.FunctionType(rest.code, frame.f_globals)(**dict.fromkeys(rest.names) | values)
    return value


def _own(value: Any, *, cloned: bool, depth: int = 0) -> Any:
    """A variable for the rest of a call, which must not change the program's: nothing that holds other things.

    Their tensors are shared, unless they are ``cloned``: what a rest clears or appends to are the containers.
    """
    if isinstance(value, torch.Generator):
        return value.clone_state()
    if untyped.is_noise_scheduler(value) or untyped.is_guider(value):
        return shallow(value)  # LTX2 steps one of its own for the sound
    if depth < DEEPEST and type(value) is list:
        return [_own(item, cloned=cloned, depth=depth + 1) for item in value]
    if depth < DEEPEST and type(value) is dict:
        return {name: _own(item, cloned=cloned, depth=depth + 1) for name, item in value.items()}
    if isinstance(value, (list, dict, set)):
        return copy.copy(value)
    if depth < DEEPEST and _is_cache(value):
        twin = copy.copy(value)
        vars(twin).update(_own(vars(value), cloned=cloned, depth=depth + 1))
        return twin
    return value.clone() if cloned and isinstance(value, torch.Tensor) else value


def _is_cache(value: Any) -> bool:
    """Whether it is an object of the request's own, as the caches of keys and values that pipelines clear at last."""
    library = type(value).__module__.partition(".")[0]
    shared = isinstance(value, (torch.nn.Module, type, types.FunctionType)) or untyped.is_pipeline(value)
    return library in ("diffusers", "transformers") and hasattr(value, "__dict__") and not shared


class _Rest:
    """The compiled rest of a function.

    Attributes:
        code: Of a function that takes the variables as keywords.
        names: Of these variables.
        changed: Those whose tensors it may change in place.
    """

    def __init__(self, code: types.CodeType, statements: Sequence[ast.stmt]) -> None:
        names = [*code.co_varnames, *code.co_cellvars, *code.co_freevars, _RESULT]
        self.names = [name for name in dict.fromkeys(names) if name.isidentifier()]
        self.changed = {name for statement in statements for name in _changed(statement)}
        module = ast.parse(f"def rest(*, {', '.join(self.names)}): pass")
        function: Any = module.body[0]
        function.body = list(statements)
        ast.fix_missing_locations(module)
        compiled = compile(module, code.co_filename, "exec", dont_inherit=True)
        self.code = next(part for part in compiled.co_consts if isinstance(part, types.CodeType))


@functools.lru_cache(maxsize=256)
def _rest(code: types.CodeType, instruction: int) -> _Rest:
    """What a function does once the call at ``instruction`` has returned.

    A loop that it stands in is left at the end of its body; ``with`` blocks are not entered again.
    """
    line, end_line, column, end_column = next(itertools.islice(code.co_positions(), instruction // 2, None))
    path = _path(_function(code), (line, column, end_line, end_column))
    if not path:
        raise LookupError(f"the source of {code.co_qualname} is not what runs")
    depth = max(depth for depth, node in enumerate(path) if isinstance(node, ast.stmt))
    replaced = _Replace(path[-1]).visit(copy.deepcopy(path[depth]))
    rest: list[Any] = [replaced]
    for parent, child in zip(reversed(path[:depth]), reversed(path[1 : depth + 1]), strict=True):
        block = next((block for block in _blocks(parent) if child in block), None)
        if block is None:
            continue
        rest += block[block.index(child) + 1 :]
        if isinstance(parent, (ast.For, ast.While)):
            once = ast.Tuple([ast.Constant(0)], ast.Load())
            rest = [ast.For(ast.Name("_steploom_turn", ast.Store()), once, rest, [])]
    return _Rest(code, rest)


@functools.lru_cache(maxsize=1)
def _tree(file: str) -> ast.Module:
    return ast.parse(Path(file).read_text(encoding="utf-8"))


def _function(code: types.CodeType) -> ast.AST:
    """The syntax tree of the function that was compiled to ``code``."""
    file = inspect.getsourcefile(code)
    for node in ast.walk(_tree(file or code.co_filename)):
        if isinstance(node, ast.FunctionDef) and node.name == code.co_name:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            if first == code.co_firstlineno:
                return node
    raise LookupError(f"no source of {code.co_qualname}")


def _path(node: ast.AST, place: tuple[Any, ...]) -> list[ast.AST]:
    """The way from ``node`` down to the call that stands at ``place``; empty if it is not there."""
    if isinstance(node, ast.Call) and _place(node) == place:
        return [node]
    for child in ast.iter_child_nodes(node):
        below = _path(child, place)
        if below:
            return [node, *below]
    return []


def _place(node: ast.expr) -> tuple[Any, ...]:
    return (node.lineno, node.col_offset, node.end_lineno, node.end_col_offset)


def _blocks(node: ast.AST) -> Iterator[list[Any]]:
    for name in ("body", "orelse", "finalbody"):
        block = getattr(node, name, None)
        if isinstance(block, list):
            yield block


class _Replace(ast.NodeTransformer):
    """Replaces a call by the name of what it returned."""

    def __init__(self, call: ast.AST) -> None:
        assert isinstance(call, ast.Call)
        self._place = _place(call)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """The call itself, or what encloses it."""
        return ast.Name(_RESULT, ast.Load()) if _place(node) == self._place else self.generic_visit(node)


def _changed(statement: ast.AST) -> Iterator[str]:
    """Variables that ``statement`` may change in place: ``x[...] = y``, ``x += y``, ``x.add_(y)``."""
    for node in ast.walk(statement):
        if isinstance(node, ast.AugAssign):
            yield _root(node.target)
        elif isinstance(node, (ast.Subscript, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            yield _root(node)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.endswith("_"):
            yield _root(node.func)


def _root(node: ast.AST) -> str:
    while isinstance(node, (ast.Subscript, ast.Attribute)):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""
