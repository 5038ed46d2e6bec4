"""Forms: what a program's calls of a module have in common from step to step.

To take a call apart, to hash it and to decide with whom it may run costs a tenth of a millisecond of Python. From one
step to the next only latents and timestep change; so a call is compared with the forms of the program's earlier calls,
argument by argument, and what was found out about one of the same form is taken over.
"""

from __future__ import annotations

import marshal
import operator
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from steploom.weave.axes import Axes
from steploom.weave.calls import SCALARS, Leaf, ModuleCall, Structure
from steploom.weave.order import is_denoiser

if TYPE_CHECKING:
    from steploom.weave.modules.shared import Target

FORMS_KEPT = 4
"""For each program and module: a pipeline may make two calls a step, one for each prompt."""

_CHANGES = object()
"""In place of an argument that is not always the same object, or that may change within."""

Check = Callable[[Any, list[Leaf]], bool]
"""Whether an argument is as it was; its tensors are appended as :func:`steploom.weave.calls.flatten` does."""

Sizes = tuple[torch.Size, torch.dtype, torch.device]
"""The same of an argument that is a tensor."""


class Facts:
    """What the hub found out about the calls of a form.

    Args:
        epoch: Of the hub: facts of an earlier one are void.
        axes: Where the batch is.
        key: The number of the merge key.
        shared: Tensors whose contents are part of that, by their place among the leaves.

    Attributes:
        batch_key: Its name, of a denoiser's calls.
        rows: How many they bring.
    """

    __slots__ = ("axes", "batch_key", "epoch", "key", "rows", "shared")

    def __init__(self, epoch: int, axes: Axes, key: int, shared: Mapping[int, Leaf]) -> None:
        self.epoch = epoch
        self.axes = axes
        self.key = key
        self.batch_key: str | None = None
        self.rows = 0
        self.shared = [(place, leaf, versions(leaf)) for place, leaf in shared.items()]

    def hold(self, epoch: int, leaves: Sequence[Leaf]) -> bool:
        """Whether they hold for a call with ``leaves``: the tensors whose contents count are the same, unchanged."""
        if epoch != self.epoch:
            return False
        for place, leaf, known in self.shared:
            own = leaves[place]
            if (own is not leaf and not same(own, leaf)) or versions(leaf) != known:
                return False
        return True


class Form:
    """The form of a call: its arguments but for what is in its tensors.

    Attributes:
        structure: As :func:`steploom.weave.calls.flatten` gives it.
        facts: What the hub found out about such calls.
    """

    __slots__ = ("_checks", "_count", "_names", "_steady", "facts", "structure")

    def __init__(
        self, structure: Structure, checks: list[Check | Sizes], steady: list[Any], count: int, names: tuple[str, ...]
    ) -> None:
        self.structure = structure
        self.facts: Facts | None = None
        self._checks = checks
        self._steady = steady
        self._count = count
        self._names = names

    def leaves(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Leaf] | None:
        """The tensors of a call of this form; None if it has another one."""
        if len(args) != self._count or tuple(kwargs) != self._names:
            return None
        leaves: list[Leaf] = []
        values = zip(self._checks, self._steady, (*args, *kwargs.values()), strict=True)
        for i, (check, steady, value) in enumerate(values):
            if value is steady:
                if isinstance(check, tuple):
                    if value.shape != check[0]:  # it was given another one in place
                        return None
                    leaves.append(value)
            elif isinstance(check, tuple):  # a call for each tensor would take longer than the comparison
                self._steady[i] = _CHANGES
                shape, dtype, device = check
                if not isinstance(value, torch.Tensor) or value.dtype is not dtype or value.shape != shape:
                    return None
                if value.device != device:
                    return None
                leaves.append(value)
            elif not check(value, leaves):
                return None
        return leaves


def form_of(
    structure: Structure, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, recurs: bool = True
) -> Form | None:
    """The form of a call; None if an argument can only be compared by taking it apart.

    One that ``recurs`` holds its tensors until the next, to know again those that stay the same.
    """
    checks: list[Check | Sizes] = []
    steady: list[Any] = []
    for value in (*args, *kwargs.values()):
        check = (value.shape, value.dtype, value.device) if isinstance(value, torch.Tensor) else _check_of(value)
        if check is None:
            return None
        checks.append(check)
        kinds = (torch.Tensor, *SCALARS) if recurs else SCALARS
        steady.append(value if isinstance(value, kinds) else _CHANGES)
    return Form(structure, checks, steady, len(args), tuple(kwargs))


def formed_call(
    target: Target, args: tuple[Any, ...], kwargs: dict[str, Any], forms: OrderedDict[Hashable, list[Form]]
) -> ModuleCall:
    """A module call in the form of an earlier one of its program, if it has it; its own form is kept otherwise.

    Args:
        target: What it runs.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        forms: Those of the program's calls of the module, by target; changed.
    """
    if target.language is not None:  # taken apart by rule
        return ModuleCall(target, args, kwargs)
    known = forms.setdefault(target.key, [])
    forms.move_to_end(target.key)
    while len(forms) > FORMS_KEPT:
        forms.popitem(last=False)
    for form in known:
        leaves = form.leaves(args, kwargs)
        if leaves is not None:
            return ModuleCall(target, args, kwargs, form, leaves)
    call = ModuleCall(target, args, kwargs)
    if call.plain[1] is not kwargs:  # likewise
        return call
    call.form = form_of(call.structure, args, kwargs, recurs=is_denoiser(target.name))
    if call.form is not None:
        known.insert(0, call.form)
        del known[FORMS_KEPT:]
    return call


def same(one: Leaf, other: Leaf) -> bool:
    """Whether two leaves are the same tensors."""
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(operator.is_, one, other))
    return one is other


def versions(leaf: Leaf) -> Hashable:
    """Changes when a leaf's tensors are updated in place."""
    return tuple(map(version, leaf)) if isinstance(leaf, list) else version(leaf)


def version(tensor: torch.Tensor) -> int:
    """Changes when a tensor is updated in place; what was made in inference mode does not say."""
    return -1 if tensor.is_inference() else tensor._version


class Kept:
    """Rows that were put together, and of what."""

    __slots__ = ("_parts", "_versions", "whole")

    def __init__(self, parts: Sequence[Leaf], whole: torch.Tensor) -> None:
        self._parts = parts
        self._versions = [versions(leaf) for leaf in (*parts, whole)]
        self.whole = whole

    def holds(self, parts: Sequence[Leaf]) -> bool:
        """Whether ``parts`` are the same, and neither they nor the whole were updated in place."""
        if not all(map(operator.is_, parts, self._parts)) and not all(map(same, parts, self._parts)):
            return False
        return [versions(leaf) for leaf in (*parts, self.whole)] == self._versions


def _check_of(value: Any) -> Check | None:
    if isinstance(value, torch.Tensor):
        return _tensor_check(value)
    if isinstance(value, SCALARS):
        kind = type(value)
        return lambda new, _: type(new) is kind and new == value
    if type(value) is list and value and all(isinstance(item, torch.Tensor) for item in value):
        return _list_check(value)
    if type(value) in (dict, list, tuple):
        return _plain_check(value) or _container_check(value)
    if isinstance(value, (torch.dtype, torch.device, torch.Size)):
        kind = type(value)
        return lambda new, _: type(new) is kind and new == value
    return None


def _tensor_check(value: torch.Tensor) -> Check:
    shape, dtype, device = value.shape, value.dtype, value.device

    def check(new: Any, leaves: list[Leaf]) -> bool:
        if not isinstance(new, torch.Tensor) or new.shape != shape or new.dtype is not dtype or new.device != device:
            return False
        leaves.append(new)
        return True

    return check


def _list_check(value: list[torch.Tensor]) -> Check:
    checks = [_tensor_check(entry) for entry in value]

    def check(new: Any, leaves: list[Leaf]) -> bool:
        own: list[Any] = []
        if type(new) is not list or len(new) != len(checks):  # pyright: ignore[reportUnknownArgumentType]
            return False
        if not all(check(entry, own) for check, entry in zip(checks, new, strict=True)):  # pyright: ignore
            return False
        leaves.append(own)
        return True

    return check


def _plain_check(value: Any) -> Check | None:
    """Of a container of nothing but numbers and strings: its bytes tell 1 from True and 1.0, as structures do."""
    if not _is_plain(value):
        return None
    kind, known = type(value), marshal.dumps(value, 2)

    def check(new: Any, leaves: list[Leaf]) -> bool:
        try:
            return type(new) is kind and marshal.dumps(new, 2) == known
        except ValueError:
            return False

    return check


def _is_plain(value: Any) -> bool:
    if type(value) is dict:
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))  # pyright: ignore
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    return type(value) in (bool, int, float, str, type(None))


def _container_check(value: Any) -> Check | None:
    """Of a container with tensors in it."""
    kind: type = type(value)
    names = tuple(value) if kind is dict else None
    children = [_check_of(child) for child in (value.values() if kind is dict else value)]
    checks = [check for check in children if check is not None]
    if len(checks) != len(children):
        return None

    def check(new: Any, leaves: list[Leaf]) -> bool:
        if type(new) is not kind or len(new) != len(checks) or (names is not None and tuple(new) != names):
            return False
        entries = new if names is None else new.values()
        return all(check(entry, leaves) for check, entry in zip(checks, entries, strict=True))

    return check
