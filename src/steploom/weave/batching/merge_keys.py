"""Merge keys: what two calls must share to be run as one."""

from __future__ import annotations

import hashlib
import math
import weakref
from collections.abc import Hashable, Sequence
from typing import Any

import torch

from steploom.weave.axes import SHARED, Axes, LeafAxis
from steploom.weave.batching.row_lists import in_common
from steploom.weave.calls import Leaf, ModuleCall, has_opaque
from steploom.weave.ragged.text import RaggedText


class Contents:
    """Tokens for the contents of shared tensors: compared by content once per tensor, then by identity.

    So a step costs no device synchronisation. A tensor that was updated in place gets a new token.
    """

    def __init__(self) -> None:
        self._tokens: dict[int, tuple[weakref.ref[torch.Tensor], int, str]] = {}

    def token(self, tensor: torch.Tensor) -> Hashable:
        """Equal for tensors of equal content, dtype and shape."""
        known = self._tokens.get(id(tensor))
        if known is not None and known[0]() is tensor and known[1] == tensor._version:
            return known[2]
        token = digest(tensor)
        gone = id(tensor)
        reference = weakref.ref(tensor, lambda _: self._tokens.pop(gone, None))
        self._tokens[id(tensor)] = (reference, tensor._version, token)
        return token


def digest(tensor: torch.Tensor) -> str:
    """A hash of a tensor's content, dtype and shape."""
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    state = hashlib.blake2b(flat.numpy().tobytes(), digest_size=16)
    state.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
    return state.hexdigest()


def rows_of(leaves: Sequence[Leaf], axes: Axes) -> int:
    """How many rows a call brings: 2 under classifier-free guidance; 0 if none of its tensors has a batch axis."""
    sizes: list[int] = []
    for leaf, axis in zip(leaves, axes.inputs, strict=True):
        if isinstance(leaf, list):
            own = (axis,) * len(leaf) if not isinstance(axis, tuple) else axis
            sizes += (
                [len(leaf)]
                if axis == "rows"
                else [t.shape[a] for t, a in zip(leaf, own, strict=True) if isinstance(a, int)]
            )
        elif isinstance(axis, int):
            sizes.append(leaf.shape[axis])
    return math.gcd(*sizes) if sizes else 0


def several(leaves: Sequence[Leaf], axes: Sequence[LeafAxis], rows: int) -> tuple[bool, ...]:
    """Which arguments have several entries for each row: calls in which others have are another kind."""
    return tuple([_entries(leaf, axis, rows) > 1 for leaf, axis in zip(leaves, axes, strict=True)])


def _entries(leaf: Leaf, axis: LeafAxis, rows: int) -> int:
    """How many entries an argument has for each row."""
    if isinstance(leaf, list):
        return len(leaf) // rows if axis == "rows" else 1
    return leaf.shape[axis] // rows if isinstance(axis, int) else 1


def call_rows(call: ModuleCall, axes: Axes) -> int:
    """How many rows a call brings, a language model's by its ids."""
    if call.language is None:
        return rows_of(call.leaves, axes)
    ids = call.leaves[0]  # the axes are those of another call, which may have more arguments
    assert isinstance(ids, torch.Tensor)
    return ids.shape[0]


def leaf_identity(leaf: Leaf) -> Hashable:
    """Which tensors a leaf is made of."""
    return tuple(map(id, leaf)) if isinstance(leaf, list) else id(leaf)


def shared_leaves(call: ModuleCall, axes: Axes) -> dict[int, Leaf]:
    """The leaves whose contents are part of the merge key, by their place."""
    found: dict[int, Leaf] = {}
    for i, (leaf, axis) in enumerate(zip(call.leaves, axes.inputs, strict=False)):
        if isinstance(leaf, list):
            if axis is SHARED or (isinstance(axis, tuple) and SHARED in axis):
                found[i] = leaf
        elif i in axes.pinned or (axis is SHARED and not is_scalar(leaf)):
            found[i] = leaf
    return found


def is_scalar(tensor: torch.Tensor) -> bool:
    """Whether a shared argument is one number, such as a timestep: it becomes one entry per row."""
    return tensor.ndim == 0 or (tensor.ndim == 1 and tensor.shape[0] == 1)


def lengths(call: ModuleCall, axes: Axes) -> Hashable:
    """The first dimensions of the entries of lists that have one entry per row, or a language model's lengths."""
    if call.language is not None:
        return call.language.lengths(call)
    rows = [leaf for leaf, axis in zip(call.leaves, axes.inputs, strict=True) if axis == "rows"]
    return tuple([entry.shape[0] if entry.ndim else 0 for leaf in rows for entry in leaf])


class Merger:
    """Decides which calls may be merged, by a hashable key.

    Attributes:
        token: Equal for tensors of equal content, which is looked at once.
    """

    def __init__(self) -> None:
        self._contents = Contents()
        self.token = self._contents.token

    def key(self, call: ModuleCall, axes: Axes) -> tuple[Hashable, ...]:
        """Equal for calls that may share a forward: structure, sizes off the batch axis, contents of shared tensors."""
        if call.language is not None:
            return (call.target.key, call.language.key(call))
        rule, structure = call.target.ragged, call.structure
        ragged: set[Hashable] = set()
        if isinstance(rule, RaggedText) and rule.applies(call.plain[1]):
            # Length and mask are what padding makes equal, so they do not keep calls apart.
            ragged = set(map(leaf_identity, rule.texts(call.plain[1])))
            _, structure = call.replaced(**rule.in_common(call.plain[1]))
        rows, parts = max(1, rows_of(call.leaves, axes)), list[Hashable]()
        for i, (leaf, axis) in enumerate(zip(call.leaves, axes.inputs, strict=True)):
            if leaf_identity(leaf) in ragged:
                continue
            if isinstance(leaf, list):
                parts.append(self._list_key(leaf, axis, rows))
            elif i in axes.pinned:
                parts.append(self._contents.token(leaf))
            else:
                parts.append(self._tensor_key(leaf, axis, rows))
        return (call.target.key, in_common(structure, axes.listed), tuple(parts))

    def _tensor_key(self, tensor: torch.Tensor, axis: Any, rows: int) -> Hashable:
        if axis is SHARED:
            return () if is_scalar(tensor) else self._contents.token(tensor)
        shape = list(tensor.shape)
        shape[axis] //= -rows  # entries of each row
        return tuple(shape)

    def _list_key(self, tensors: list[torch.Tensor], axis: LeafAxis, rows: int) -> Hashable:
        if axis == "rows":
            return (
                "rows",
                len(tensors) // rows,
                *(tuple(t.shape[1:]) for t in tensors[:1]),
            )  # each row may have a length of its own
        axes = axis if isinstance(axis, tuple) else (axis,) * len(tensors)
        return tuple(
            self._contents.token(t) if a is SHARED and t.ndim else self._tensor_key(t, a, rows)
            for t, a in zip(tensors, axes, strict=True)
        )


class KeyNames:
    """Short names for merge keys, stable for the life of the process."""

    def __init__(self) -> None:
        self._names: dict[Hashable, str] = {}

    def name(self, key: Hashable, call: ModuleCall) -> str:
        """The name of ``key``, that of ``call``: module, sizes, and a number."""
        if has_opaque(call.structure):  # equal to nobody's; a name would keep it alive
            return f"{call.target.name}:alone"
        name = self._names.get(key)
        if name is None:
            first = next((leaf for leaf in call.leaves if isinstance(leaf, torch.Tensor) and leaf.ndim > 1), None)
            sizes = "" if first is None else "x".join(map(str, first.shape[1:]))
            name = self._names[key] = f"{call.target.name}:{sizes}#{len(self._names)}"
        return name
