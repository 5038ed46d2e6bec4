"""What a program switches deep inside its private tree of a module: plain attributes of submodules, and their children.

GLIGEN turns its gated layers off in the middle of a call. A program that does so must not share a forward with one that
does not, or not yet, though both run clones of the same module.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable
from typing import Any

from torch import nn

_PLAIN = (bool, int, float, str, type(None))


class Switches:
    """Watches a tree of modules for changes.

    Args:
        tree: As it is shared.
    """

    def __init__(self, tree: nn.Module) -> None:
        self._parts = [_Part(path, module) for path, module in tree.named_modules()]

    def changed(self) -> Hashable:
        """What is otherwise than at the start, empty if nothing: equal for trees that were changed alike."""
        return tuple([change for part in self._parts if not part.untouched() for change in part.changes()])


class _Part:
    """A module of the tree, and how it was."""

    def __init__(self, path: str, module: nn.Module) -> None:
        self._path, self._module = path, module
        self._plain, self._children = _plain(module), dict(module.__dict__["_modules"])
        self._freeze()

    def _freeze(self) -> None:
        own = self._module.__dict__
        self._seen = (tuple(own.values()), tuple(self._module.__dict__["_modules"].values()))

    def untouched(self) -> bool:
        """Whether nothing was set since it was last looked at: cheap, since every module is asked at every call."""
        pairs = zip(
            self._seen, (self._module.__dict__.values(), self._module.__dict__["_modules"].values()), strict=True
        )
        return all(len(old) == len(new) and all(map(operator.is_, old, new)) for old, new in pairs)

    def changes(self) -> list[Hashable]:
        """Plain attributes that differ from the start, and children that are others. Caches (tensors) do not count."""
        now, children = _plain(self._module), self._module.__dict__["_modules"]
        found: list[Hashable] = [
            (self._path, name, type(now.get(name)).__name__, now.get(name))
            for name in sorted(now.keys() | self._plain.keys())
            if now.get(name, self) != self._plain.get(name, self)
        ]
        names = sorted(children.keys() | self._children.keys())
        found += [(self._path, n, id(children.get(n))) for n in names if children.get(n) is not self._children.get(n)]
        if not found:
            self._freeze()
        return found


def _plain(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in module.__dict__.items() if type(value) in _PLAIN}
