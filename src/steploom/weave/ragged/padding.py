"""Padding: the leaves of calls whose text has lengths of its own, made as long as the longest's, with masks."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

from steploom.weave.axes import SHARED, Axes, LeafAxis
from steploom.weave.batching.merge_keys import leaf_identity
from steploom.weave.calls import Leaf, ModuleCall, Structure, flatten
from steploom.weave.forms import versions
from steploom.weave.ragged.text import Padded, RaggedText


class Padding:
    """Calls' leaves in the structure that the first one has when padded.

    Args:
        rule: Of the module's family.
        calls: Of one merged call.
        each: The axes of each.
        length: Of the longest text.

    Attributes:
        leaves: Of each call.
        structure: Around those of the first one.
        axes: Of its leaves.
    """

    def __init__(self, rule: RaggedText, calls: Sequence[ModuleCall], each: Sequence[Axes], length: int) -> None:
        self._rule = rule
        self._texts = [self._texts_of(call) for call in calls]
        self._places: list[list[int | None]] = []
        self.leaves: list[list[Leaf]] = []
        self.structure, self.axes = self._pad(calls[0], each[0], length)
        for call, own in zip(calls[1:], each[1:], strict=True):
            self._pad(call, own, length)

    @classmethod
    def of(cls, calls: Sequence[ModuleCall], each: Sequence[Axes]) -> Padding | None:
        """Where calls have texts of different lengths, or masks; else they merge as they are."""
        rule, arguments = calls[0].target.ragged, [call.plain[1] for call in calls]
        if not isinstance(rule, RaggedText) or not rule.applies(arguments[0]):
            return None
        lengths = set(map(rule.length, arguments))
        if len(lengths) == 1 and all(rule.given_mask(own) is None for own in arguments):
            return None
        return cls(rule, calls, each, max(lengths))

    def refilled(self, calls: Sequence[ModuleCall]) -> list[list[Leaf]] | None:
        """The leaves of the same calls a step later; None if texts that were padded have changed."""
        if [self._texts_of(call) for call in calls] != self._texts:
            return None
        self.leaves = [
            [padded[i] if place is None else call.leaves[place] for i, place in enumerate(places)]
            for call, padded, places in zip(calls, self.leaves, self._places, strict=True)
        ]
        return self.leaves

    def _pad(self, call: ModuleCall, axes: Axes, length: int) -> tuple[Structure, tuple[LeafAxis, ...]]:
        changes = self._rule.padded(call.plain[1], length)
        leaves, structure = call.replaced(**{name: one.value for name, one in changes.items()})
        known: dict[Hashable, LeafAxis] = dict(axis for one in changes.values() for axis in _axes_of(one))
        known |= {leaf_identity(leaf): axis for leaf, axis in zip(call.leaves, axes.inputs, strict=True)}
        places = {leaf_identity(leaf): place for place, leaf in enumerate(call.leaves)}
        self._places.append([places.get(leaf_identity(leaf)) for leaf in leaves])
        self.leaves.append(leaves)
        return structure, tuple([known[leaf_identity(leaf)] for leaf in leaves])

    def _texts_of(self, call: ModuleCall) -> list[Hashable]:
        """Which texts and mask a call has; they live as long as it does."""
        return [(leaf_identity(text), versions(text)) for text in self._rule.texts(call.plain[1])]


def _axes_of(padded: Padded) -> Iterator[tuple[Hashable, LeafAxis]]:
    """The batch axes of the leaves of an argument that was padded, by their identity."""
    leaves: list[Leaf] = []
    flatten(padded.value, leaves)
    axis = 0 if padded.rows else SHARED
    for leaf in leaves:
        yield leaf_identity(leaf), (axis,) * len(leaf) if isinstance(leaf, list) else axis
