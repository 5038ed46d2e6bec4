"""What a program did to a module that cannot be cloned: it is found when the program stops, and undone.

A module with offloading hooks, or a ``forward`` that was set on an object, has no variants, so a program that walks
through it (``modules()``) sees the parts that everybody's calls run. It may look at them. If it has changed one by the
time it suspends, the change is taken back before anybody else runs, and the program fails.
"""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import greenlet
import torch
from torch import nn

from steploom.errors import GenerationFailed
from steploom.weave.modules.offloading import is_offloaded

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
TABLES = ("_modules", "_parameters", "_buffers", *HOOKS)
CONTAINERS = (list, dict, OrderedDict)
DEEPEST = 4
"""How deep lists and dicts in an attribute are looked at."""

_TORCHS = frozenset(nn.Module().__dict__)

Holder = dict[Any, Any] | list[Any]


def holders(module: nn.Module) -> Iterator[Holder]:
    """Where a module and its attention processor have what can be set: attributes, tables, lists and dicts."""
    own = module.__dict__
    yield own
    for table in TABLES:
        yield own[table]
    for name, value in own.items():
        if type(value) in CONTAINERS and name not in _TORCHS:
            yield from _inside(value)
    processor: Any = own.get("processor")
    if hasattr(processor, "__dict__"):
        yield from _inside(processor.__dict__)


def _inside(container: Holder, depth: int = DEEPEST) -> Iterator[Holder]:
    """A list or dict, and those in it."""
    yield container
    for value in container if isinstance(container, list) else container.values():
        if type(value) in CONTAINERS and depth:
            yield from _inside(value, depth - 1)


class Kept:
    """A module tree as it is now.

    Args:
        tree: The module.
    """

    def __init__(self, tree: nn.Module) -> None:
        self.tree = tree
        self._were = [(holder, holder.copy()) for module in tree.modules() for holder in holders(module)]

    def restore(self) -> bool:
        """Makes it what it was; whether it was otherwise. Caches (tensors) do not count: calls of parts keep such."""
        changed = [(holder, was) for holder, was in self._were if _differ(holder, was)]
        for holder, was in changed:
            holder.clear()
            holder.update(was) if isinstance(holder, dict) else holder.extend(was)
        return bool(changed)


def _differ(holder: Holder, was: Holder) -> bool:
    if isinstance(holder, list) or isinstance(was, list):
        return len(holder) != len(was) or not all(map(operator.is_, holder, was))
    if holder.keys() == was.keys() and all(map(operator.is_, holder.values(), map(was.__getitem__, holder))):
        return False
    pairs = [(holder.get(name), was.get(name)) for name in holder.keys() | was.keys()]
    return any(new is not old and not isinstance(new, torch.Tensor) for new, old in pairs)


def keep(tree: nn.Module) -> None:
    """Keeps a module tree until the program that runs now stops: it sees parts that others use."""
    kept: list[Kept] | None = getattr(greenlet.getcurrent(), "kept", None)
    if kept is not None and all(one.tree is not tree for one in kept):
        kept.append(Kept(tree))


def restore(kept: list[Kept]) -> GenerationFailed | None:
    """Takes back what a program has changed of these; what it fails with if it has."""
    changed = [one.tree for one in kept if one.restore()]
    kept.clear()
    return unclonable(changed[0]) if changed else None


def unclonable(tree: nn.Module) -> GenerationFailed:
    """Why a program cannot change a module."""
    name, parts = type(tree).__name__, [part for part in tree.modules() if "forward" in part.__dict__]
    changes = "(attention processors, dtype, or something that its code or a callback sets on a part of it)"
    if not parts or any(is_offloaded(part) or "_hf_hook" in part.__dict__ for part in parts):
        has, mend = "an offloading hook", "serve it without offloading"
    else:
        has = f"a forward that was set on an object (its {type(parts[0]).__name__}) and cannot be cloned"
        mend = "define it in a subclass, and set the object's __class__, instead"
    return GenerationFailed(f"{name} has {has}, but this pipeline changes the module while it runs {changes}; {mend}")
