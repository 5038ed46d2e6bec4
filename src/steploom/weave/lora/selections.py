"""What requests have chosen of adapters: made once for all who choose the same, and kept for the next of them."""

from __future__ import annotations

from collections import OrderedDict

from steploom.weave.lora.adapters import Adapter, Chosen, Weaver
from steploom.weave.lora.blend import View
from steploom.weave.modules.structure import Token


class Selection:
    """What a request has chosen, in use or kept for the next that chooses the same.

    Attributes:
        chosen: Adapters and scales.
        views: The modules with these, by identity of the pipeline's own.
        users: Requests that use it.
    """

    def __init__(self, chosen: Chosen, views: dict[int, View]) -> None:
        self.chosen = chosen
        self.views = views
        self.users = 0


SelectionKey = tuple[tuple[tuple[int, float], ...], tuple[Token, ...]]
"""Adapters and scales, and what the modules were when they were put on."""


class Selections:
    """Selections by their adapters and scales; a few are kept when nobody uses them.

    Args:
        weaver: Makes their views.
    """

    KEPT = 8

    def __init__(self, weaver: Weaver) -> None:
        self._weaver = weaver
        self._made: OrderedDict[SelectionKey, Selection] = OrderedDict()

    def take(self, chosen: Chosen) -> Selection:
        """The selection of these adapters, with one more user.

        Raises:
            InvalidRequest: They cannot be stacked.
        """
        key = (tuple((adapter.number, scale) for adapter, scale in chosen), self._weaver.made_from)
        if key not in self._made:
            self._made[key] = Selection(chosen, self._weaver.views(chosen))
        self._made.move_to_end(key)
        self._made[key].users += 1
        return self._made[key]

    def give_back(self, selection: Selection) -> None:
        """One user less."""
        selection.users -= 1
        idle = [key for key, one in self._made.items() if not one.users]
        for key in idle[: max(0, len(idle) - self.KEPT)]:
            self._drop(key)

    def uses(self, adapter: Adapter) -> int:
        """How many requests use an adapter."""
        return sum(one.users for one in self._made.values() if any(own is adapter for own, _ in one.chosen))

    def forget(self, adapter: Adapter | None = None) -> None:
        """Drops what nobody uses: of an adapter, or all."""
        for key, one in list(self._made.items()):
            if not one.users and (adapter is None or any(own is adapter for own, _ in one.chosen)):
                self._drop(key)
        if not self._made:
            self._weaver.reset()

    def _drop(self, key: SelectionKey) -> None:
        for view in self._made.pop(key).views.values():
            view.close()
