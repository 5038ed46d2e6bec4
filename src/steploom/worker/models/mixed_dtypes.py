"""Dtypes by component: those with which a pipeline's VAE fails, most of them after its last step."""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from steploom.errors import ConfigError
from steploom.weave import source_code, untyped
from steploom.weave.order import is_denoiser
from steploom.weave.source_code import Function

_VAE, _ITS_DTYPE, _MOVES = "vae", "self.vae.dtype", "self.vae.to"
_ENCODE, _DECODE, _STEP = "self.vae.encode", "self.vae.decode", "self.scheduler.step"

_BRINGING = ("StableDiffusionUpscalePipeline",)
"""Pipelines that bring latents to the dtype of the VAE's weights, as others do to a VAE in float16 alone."""

_TAKING = ("ZImageControlNetPipeline", "ZImageControlNetInpaintPipeline")
"""Pipelines that bring pictures to the VAE's dtype, and hand on what it makes of them as it is."""

_COMPUTED = (torch.float32, torch.float16, torch.bfloat16)
"""Others are how weights are stored."""


class _Part(NamedTuple):
    """Some statements of a function.

    Attributes:
        body: The function.
        first: Of its lines.
        last: Of its lines.
        needed: The pipeline's first parameter, which everybody gives.
    """

    body: Function
    needed: str
    first: float = 0
    last: float = math.inf

    def nodes(self) -> Iterator[ast.AST]:
        """What is in these lines; nothing of what is done only where a picture or the like is given."""
        return (
            node
            for node in _wanted(self.body, self.needed)
            if self.first <= getattr(node, "lineno", self.first) <= self.last
        )


def fails(cls: Any, dtypes: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype of a denoiser with which the VAE, in another, does not go in a pipeline of this class; None if they go.

    Args:
        cls: The pipeline's class.
        dtypes: By component.
    """
    own = dtypes.get(_VAE)
    others = (dtype for name, dtype in dtypes.items() if is_denoiser(name) and dtype in _COMPUTED and dtype != own)
    other = next(others, None)
    if own not in _COMPUTED or other is None:
        return None
    return other if any(_hands_on(one, own) for one in (cls, *_made_within(cls))) else None


def refuse(cls: Any, given: Any, dtypes: dict[str, torch.dtype]) -> None:
    """Refuses a VAE of another dtype than the denoisers', where the pipeline does not bring one's to the other's.

    Args:
        cls: The pipeline's class.
        given: The setting, for the message.
        dtypes: By component.

    Raises:
        ConfigError: Names both dtypes.
    """
    other = fails(cls, dtypes)
    if other is None:
        return
    named, wanted = (str(dtype).removeprefix("torch.") for dtype in (dtypes[_VAE], other))
    raise ConfigError(
        f"dtype={given!r}: {cls.__name__} does not bring what it hands to the VAE, in {named}, or from it to the "
        f"denoiser, in {wanted}, to the other's dtype, and would fail; give both one dtype, such as {wanted!r}"
    )


def _made_within(cls: Any) -> list[Any]:
    """The classes of the pipelines that a combined pipeline makes of its components (VisualCloze)."""
    init = source_code.function(cls, "__init__")
    named = _called(ast.walk(init)) if init is not None else []
    known: dict[str, Any] = getattr(inspect.unwrap(cls.__init__), "__globals__", {})
    found = [known.get(name) for name in named]
    return [one for one in found if isinstance(one, type) and issubclass(one, untyped.PIPELINE)]


def _hands_on(cls: Any, own: torch.dtype) -> bool:
    """Whether it can be seen that a pipeline brings to the VAE's dtype neither itself nor what the VAE is given."""
    call = source_code.function(cls, "__call__")
    if call is None or cls.__name__ in _BRINGING:
        return False
    steps = [node.lineno for node in ast.walk(call) if isinstance(node, ast.Call) and ast.unparse(node.func) == _STEP]
    needed, last = call.args.args[1].arg if len(call.args.args) > 1 else "", max(steps, default=0)
    before, after = (_reached(cls, _Part(call, needed, *lines)) for lines in ((0, last), (last, math.inf)))
    if _is_moved(call, before[1:]):
        return False
    upcast = own == torch.float16 and "force_upcast" in ast.unparse(call)
    return cls.__name__ in _TAKING or _unheeded(before, _ENCODE) or (not upcast and _unheeded(after, _DECODE))


def _is_moved(call: Function, methods: list[_Part]) -> bool:
    """Whether the VAE is brought to another dtype in any case, or to that of the others before the first step."""
    anyhow = [line for line in call.body if isinstance(line, (ast.Expr, ast.Assign))]
    if any(_MOVES in _called(ast.walk(line)) for line in ([call] if torch.backends.mps.is_available() else anyhow)):
        return True
    moves = [node for method in methods for node in ast.walk(method.body)
             if isinstance(node, ast.Call) and ast.unparse(node.func) == _MOVES]  # fmt: skip
    return any("torch.float" not in ast.unparse(move) for move in moves)


def _reached(cls: Any, part: _Part) -> list[_Part]:
    """Part of ``__call__``, and the pipeline's own methods that are called there, and those that these call."""
    parts, names = [part], {"__call__"}
    for one in parts:  # grows
        for name in (name.removeprefix("self.") for name in _called(one.nodes()) if name.startswith("self.")):
            if name.isidentifier() and name not in names and not hasattr(untyped.PIPELINE, name):
                names.add(name)
                found = source_code.function(cls, name)
                parts += [] if found is None else [_Part(found, part.needed)]
    return parts


def _unheeded(parts: list[_Part], use: str) -> bool:
    """Whether the VAE is used in these parts, but not its dtype, there, in the first, or in preparing pictures."""
    users = [part for part in parts if use in _called(part.nodes())]
    return bool(users) and not any(map(_heeds, parts if use == _ENCODE else [parts[0], *users]))


def _called(nodes: Iterable[ast.AST]) -> list[str]:
    """What is called among the nodes of a function."""
    return [ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)]


def _wanted(node: ast.AST, needed: str) -> Iterator[ast.AST]:
    """The nodes of a function but for those of branches for who gives something."""
    for name, value in ast.iter_fields(node):
        test = ast.unparse(node.test) if isinstance(node, (ast.If, ast.IfExp)) and name == "body" else ""
        if "is not None" in test and not test.startswith((f"{needed} is not None", f"{needed}s is not None")):
            continue
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, ast.AST):
                yield inner
                yield from _wanted(inner, needed)


def _heeds(part: _Part) -> bool:
    """Whether the VAE's dtype is used for more than to be compared, or to be kept for other parts."""
    all_nodes = list(ast.walk(part.body))
    aside = {id(inner) for node in all_nodes if isinstance(node, ast.Compare) for inner in ast.walk(node)}
    kept = [
        (names, value) for names, value, _ in source_code.assignments(part.body) if ast.unparse(value) == _ITS_DTYPE
    ]
    aside.update(id(value) for _, value in kept)
    uses = {_ITS_DTYPE}.union(*(names for names, _ in kept))
    return any(
        isinstance(node, (ast.Attribute, ast.Name))
        and isinstance(node.ctx, ast.Load)
        and id(node) not in aside
        and part.first <= node.lineno <= part.last
        and ast.unparse(node) in uses
        for node in all_nodes
    )
