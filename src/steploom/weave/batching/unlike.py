"""Why a call found nobody to share with: which of its arguments keep it apart from its mates'."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from steploom.weave.axes import SHARED, Axes, LeafAxis
from steploom.weave.batching.merge_keys import is_scalar, leaf_identity
from steploom.weave.batching.row_lists import in_common
from steploom.weave.calls import Leaf, ModuleCall, flatten, has_opaque
from steploom.weave.ragged.text import RaggedText

ONLY_ONE = "only one"
OWN_OBJECT = "an argument is an object of its own, such as a cache that the module writes"
BRANCHES = "nobody else has as many branches of guidance, by which the module takes its rows"
UNLIKE = "nothing alike to share with"
log = logging.getLogger(__name__)

_MATES = 4
"""As many are compared: the likest of them is told of."""

_NAMED = 3
"""Arguments that are named at most."""

Token = Callable[[torch.Tensor], Hashable]


def why_alone(call: ModuleCall, mates: Sequence[ModuleCall], axes: Axes, token: Token) -> str:
    """Why ``call`` is run alone. What it says is made of names of arguments, not of sizes or values.

    Args:
        call: Which differs from all others.
        mates: The others that its module was called with.
        axes: Of ``call``.
        token: Equal for tensors of equal content.
    """
    if not mates:
        return ONLY_ONE
    if has_opaque(call.structure):
        return OWN_OBJECT
    try:
        found = min((list(_differences(call, mate, axes, token)) for mate in mates[:_MATES]), key=len)
    except Exception as fault:  # noqa: BLE001 - arguments that cannot be compared: it runs alone all the same
        log.info("a call of %s cannot be compared with others: %s", call.target.name, fault)
        found = []
    return f"{UNLIKE}: {'; '.join(found[:_NAMED])}" if found else UNLIKE


def _differences(call: ModuleCall, mate: ModuleCall, axes: Axes, token: Token) -> Iterator[str]:
    if call.target.key != mate.target.key:
        others = sorted(_processors(call) ^ _processors(mate))
        named = f"other attention processors ({', '.join(others[:_NAMED])})"
        yield f"the module has {named if others else 'processors, adapters or a dtype of its own'}"
        return
    own, theirs = _named(call), _named(mate)
    rule = call.target.ragged
    padded = rule.in_common(call.plain[1]) if isinstance(rule, RaggedText) and rule.applies(call.plain[1]) else {}
    places = zip(call.leaves, axes.inputs, strict=False)
    known: dict[Hashable, LeafAxis] = {leaf_identity(leaf): axis for leaf, axis in places}
    for i, name in enumerate(own):
        said = None if name in padded else _difference(own[name], theirs.get(name), known, token)
        if said is not None and not _alike_for_rows(call, mate, axes, i):
            yield f"{name} {said}"
    more = (name for name, value in theirs.items() if name not in own and name not in padded and value is not None)
    yield from (f"{name} is given to one only" for name in more)


def _processors(call: ModuleCall) -> set[str]:
    """The classes of attention processors that the module has: with and without guidance PAG sets others."""
    parts = call.target.module.modules() if isinstance(call.target.module, nn.Module) else ()
    return {type(part.__dict__["processor"]).__name__ for part in parts if "processor" in part.__dict__}


def _named(call: ModuleCall) -> dict[str, Any]:
    args, kwargs = call.plain
    return {**{f"argument {i + 1}": value for i, value in enumerate(args)}, **kwargs}


def _difference(one: Any, other: Any, axes: Mapping[Hashable, LeafAxis], token: Token) -> str | None:
    ours: list[Leaf] = []
    theirs: list[Leaf] = []
    if flatten(one, ours) != flatten(other, theirs):
        return "is given to one only" if one is None or other is None else "has another value"
    for leaf, mates in zip(ours, theirs, strict=True):
        axis = axes.get(leaf_identity(leaf), 0)
        if _sizes(leaf, axis) != _sizes(mates, axis):
            return "has another size"
        if any(token(a) != token(b) for a, b in _shared(leaf, mates, axis)):
            return "differs, and all rows share it"
    return None


def _shared(leaf: Leaf, mates: Leaf, axis: LeafAxis) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What has to be equal, and the mate's."""
    if isinstance(leaf, list) and isinstance(mates, list):
        each = axis if isinstance(axis, tuple) else (axis,) * len(leaf)
        pairs = zip(leaf, mates, each, strict=False)
        yield from ((one, other) for one, other, own in pairs if own is SHARED and one.ndim)
    elif isinstance(leaf, torch.Tensor) and isinstance(mates, torch.Tensor) and axis is SHARED and not is_scalar(leaf):
        yield leaf, mates


def _sizes(leaf: Leaf, axis: LeafAxis) -> Hashable:
    """The sizes that have to be equal."""
    if isinstance(leaf, list):
        if axis == "rows":
            return tuple(leaf[0].shape[1:])
        each = axis if isinstance(axis, tuple) and len(axis) == len(leaf) else (axis,) * len(leaf)
        return tuple(_sizes(entry, own) for entry, own in zip(leaf, each, strict=True))
    return tuple(-1 if i == axis else size for i, size in enumerate(leaf.shape))


def _alike_for_rows(call: ModuleCall, mate: ModuleCall, axes: Axes, place: int) -> bool:
    """Whether an argument is a list of values of one entry for each row, and the entry is the mate's."""
    (args, _), paths = call.plain, axes.listed
    path = (0, place) if place < len(args) else (1, place - len(args))
    if path not in paths:
        return False
    ours, theirs = in_common(call.structure, paths), in_common(mate.structure, paths)
    return _at(ours, path) == _at(theirs, path)


def _at(structure: Any, path: tuple[int, ...]) -> Any:
    for place in path:
        structure = structure.children[place]
    return structure
