"""Module calls: a suspended call of a shared module, taken apart into tensors and structure.

``flatten`` separates a call's arguments (or a module's result) into *leaves* (tensors, and lists of tensors) and a
hashable *structure* that holds everything else, Python scalars by value. Two calls with equal structures differ only
in tensors. ``unflatten`` is the inverse.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from steploom.weave import caches, untyped

if TYPE_CHECKING:
    from steploom.weave.forms import Form
    from steploom.weave.modules.shared import Target
    from steploom.weave.ragged.language import LanguageRule
    from steploom.weave.ragged.text import Arguments

Leaf = torch.Tensor | list[torch.Tensor]
Structure = Hashable

SCALARS = (bool, int, float, complex, str, bytes, type(None))


@dataclasses.dataclass(frozen=True, slots=True)
class Opaque:
    """An object that is neither tensor, scalar nor container: equal only to itself."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Opaque) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


@dataclasses.dataclass(frozen=True, slots=True)
class Node:
    """A container in a structure; ``context`` is what is needed to build it anew around its children."""

    kind: type
    context: Hashable
    children: tuple[Any, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Slot:
    """The place of a tensor: everything that must agree except its shape."""

    ndim: int
    dtype: torch.dtype
    device: torch.device


@dataclasses.dataclass(frozen=True, slots=True)
class ListSlot:
    """The place of a list of tensors of one dtype. Its length is data: some models take one entry per row."""

    dtype: torch.dtype
    device: torch.device


def flatten(value: Any, leaves: list[Leaf]) -> Structure:
    """Appends the tensors in ``value`` to ``leaves`` and returns the structure around them."""
    if isinstance(value, torch.Tensor):
        leaves.append(value)
        return Slot(value.ndim, value.dtype, value.device)
    if isinstance(value, SCALARS):
        return (type(value), value)  # the type too: True == 1 == 1.0
    if type(value) is dict:
        return Node(dict, tuple(value), tuple(flatten(child, leaves) for child in value.values()))
    if type(value) is list and value and all(isinstance(item, torch.Tensor) for item in value):
        leaves.append(list(value))  # our own: a module may empty the list that it is given (T2I-Adapter's UNets)
        return ListSlot(value[0].dtype, value[0].device)
    if type(value) in (list, tuple):
        return Node(type(value), None, tuple(flatten(child, leaves) for child in value))
    return _flatten_registered(value, leaves)


def _flatten_registered(value: Any, leaves: list[Leaf]) -> Structure:
    """Model outputs and the like, which register themselves with torch's pytree; anything else is opaque."""
    if isinstance(value, untyped.GaussianRows):  # what VAEs encode to; has rows like a tensor, but is none
        return Node(type(value), value.deterministic, (flatten(value.parameters, leaves),))
    fields = vars(value) if type(value) is SimpleNamespace else caches.fields(value)
    if fields is not None:
        return Node(type(value), tuple(fields), tuple(flatten(child, leaves) for child in fields.values()))
    registered = pytree.SUPPORTED_NODES.get(type(value))
    if registered is None:
        try:
            hash(value)
        except TypeError:
            return Opaque(value)
        return (type(value), value) if isinstance(value, (torch.dtype, torch.device, torch.Size)) else Opaque(value)
    children, context = registered.flatten_fn(value)
    frozen = tuple(context) if isinstance(context, list) else Opaque(context)
    return Node(type(value), frozen, tuple(flatten(child, leaves) for child in children))


def unflatten(structure: Structure, leaves: Sequence[Leaf]) -> Any:
    """The inverse of :func:`flatten`."""
    return _build(structure, iter(leaves))


def _build(structure: Any, leaves: Any) -> Any:
    if isinstance(structure, (Slot, ListSlot)):
        return next(leaves)
    if isinstance(structure, tuple):
        return structure[1]
    if isinstance(structure, Opaque):
        return structure.value
    children = [_build(child, leaves) for child in structure.children]
    if structure.kind is dict:
        return dict(zip(structure.context, children, strict=True))
    if structure.kind is SimpleNamespace or structure.kind.__name__ in caches.CLASSES:
        return caches.made(structure.kind, dict(zip(structure.context, children, strict=True)))
    if structure.kind in (list, tuple):
        return structure.kind(children)
    if issubclass(structure.kind, untyped.GaussianRows):
        return structure.kind(children[0], deterministic=structure.context)
    context = structure.context.value if isinstance(structure.context, Opaque) else list(structure.context)
    return pytree.SUPPORTED_NODES[structure.kind].unflatten_fn(children, context)


def has_opaque(structure: Any) -> bool:
    """Whether anything in ``structure`` is an object that can neither be split nor compared by value."""
    if isinstance(structure, Node):
        return any(has_opaque(child) for child in structure.children)
    return isinstance(structure, Opaque)


def has_cache(structure: Any) -> bool:
    """Whether ``structure`` is around a cache that a pipeline keeps from step to step."""
    if not isinstance(structure, Node):
        return False
    return structure.kind.__name__ in caches.CLASSES or any(has_cache(child) for child in structure.children)


def is_tuple_of_tensors(structure: Any) -> bool:
    """Whether ``structure`` is a tuple of nothing else: what diffusers' denoisers return."""
    return isinstance(structure, Node) and structure.kind is tuple and all(type(c) is Slot for c in structure.children)


def is_value(structure: Any) -> bool:
    """Whether ``structure`` is one Python value."""
    return isinstance(structure, tuple) and structure[0] in (bool, int, float, str)  # pyright: ignore


def values(structure: Any) -> list[Any]:
    """The Python values in ``structure``, in order."""
    if isinstance(structure, Node):
        return [value for child in structure.children for value in values(child)]
    return [structure[1]] if is_value(structure) else []


def is_plain(structure: Any) -> bool:
    """Whether there is nothing but Python values in ``structure``."""
    if isinstance(structure, Node):
        return all(is_plain(child) for child in structure.children)
    return isinstance(structure, tuple)


def pattern(structure: Any) -> Hashable:
    """``structure`` without the values of its scalars, and lengths of lists of them: what axes are filed under."""
    if isinstance(structure, Node):
        children = [pattern(child) for child in structure.children]
        if structure.kind is list and is_plain(structure):  # it may have an entry per row
            children = dict.fromkeys(children)
        return Node(structure.kind, structure.context, tuple(children))
    if isinstance(structure, tuple):
        return structure[0]  # pyright: ignore[reportUnknownVariableType]
    if isinstance(structure, Slot):
        return structure.ndim
    if isinstance(structure, Opaque):
        return type(structure.value)  # not the object: what is learned would keep a request's caches alive
    return ListSlot if isinstance(structure, ListSlot) else structure


class ModuleCall:
    """A suspended call of a shared module.

    Attributes:
        target: Which module, in which variant, and which of its methods.
        language: The rule by which a language model's call is merged; None for any other call.
        plain: The arguments, as the rule of the module's family takes them apart.
        leaves: The tensors among them.
        structure: Everything else.
        form: What it has in common with other calls of its program, which is as much as ``structure`` and sizes; None
            if its arguments can only be compared by taking them apart.
    """

    __slots__ = ("_args", "_kwargs", "form", "language", "leaves", "plain", "structure", "target")

    def __init__(
        self,
        target: Target,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        form: Form | None = None,
        leaves: list[Leaf] | None = None,
    ) -> None:
        self.target = target
        self._args, self._kwargs = args, kwargs
        self.form = form
        self.language: LanguageRule | None = None
        self.plain: Arguments = (args, kwargs)
        if form is not None and leaves is not None:
            self.leaves, self.structure = leaves, form.structure
            return
        rule = target.ragged
        apart = None if rule is None else rule.taken_apart(args, kwargs)
        if apart is not None:
            self.plain = apart
            self.language = target.language
        self.leaves = []
        self.structure = flatten(self.plain, self.leaves)

    def run(self) -> Any:
        """Runs the real module on this call's own arguments."""
        if self.plain[1] is self._kwargs and any(isinstance(leaf, list) for leaf in self.leaves):
            args, kwargs = unflatten(self.structure, [list(x) if isinstance(x, list) else x for x in self.leaves])
            return self.target.invoke(*args, **kwargs)
        return self.target.invoke(*self._args, **self._kwargs)

    @property
    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments, as they were given."""
        return self._args, dict(self._kwargs)

    def place(self, index: int) -> Any:
        """A positional argument, None if it was not given."""
        return self._args[index] if index < len(self._args) else None

    def argument(self, name: str) -> Any:
        """A keyword argument, None if it was not given."""
        return self._kwargs.get(name)

    def replaced(self, **changes: Any) -> tuple[list[Leaf], Structure]:
        """Leaves and structure with other keyword arguments."""
        leaves: list[Leaf] = []
        args, kwargs = self.plain
        return leaves, flatten((args, {**kwargs, **changes}), leaves)
