"""Merging: the rows of several module calls become one call, and its result is split again.

**This is where rows are merged**, in the order that their :class:`~steploom.weave.batching.layouts.Layout`
says: branch-major, ``[A0 B0 A1 B1]``, as processors that chunk the batch by branch (perturbed-attention guidance) need
it.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from typing import Any

import torch

from steploom.weave.axes import SHARED, Axes, Axis, LeafAxis
from steploom.weave.batching import row_lists
from steploom.weave.batching.layouts import Layout
from steploom.weave.batching.merge_keys import call_rows, is_scalar, lengths, several
from steploom.weave.batching.wholes import Wholes
from steploom.weave.calls import (
    Leaf,
    ModuleCall,
    Node,
    Structure,
    flatten,
    has_cache,
    has_opaque,
    is_tuple_of_tensors,
    is_value,
    unflatten,
)
from steploom.weave.forms import Kept
from steploom.weave.lora.blend import BASE
from steploom.weave.order import is_denoiser
from steploom.weave.ragged.language import LanguageRule
from steploom.weave.ragged.padding import Padding


class Unsplittable(Exception):
    """The result of a merged call cannot be taken apart by rows."""


class MergedCall:
    """Several module calls as one.

    Args:
        calls: With equal merge keys.
        axes: Of the first call's leaves and of the result.
        each: The axes of each call, where they are not the first one's: padding gives a mask to those without one.
        branches: Of each call, if calls of different row counts are to stand by branch; 0: not known how many.

    Attributes:
        calls: In the order of their rows.
        rows: Rows of each call.
        layout: Where they stand.
        mixed: Whether row counts differ.
        uneven: Whether lists with one entry per row differ in the lengths of their entries, or a language model's calls
            in theirs.
        adapters: Of each call, by their name in the blend.
        blended: Whether these differ.
        total_rows: Of the merged call.
        kind: What is verified once: module, call structure and variant, not sizes.
        forward_s: Seconds that the real module took when it ran last.
    """

    def __init__(
        self,
        calls: Sequence[ModuleCall],
        axes: Axes,
        each: Sequence[Axes] | None = None,
        wholes: Wholes | None = None,
        branches: int | None = None,
    ) -> None:
        self.target = calls[0].target
        self._wholes = wholes
        self.forward_s = 0.0
        by_call = [axes] * len(calls) if each is None else each
        counted = sorted(
            ((call_rows(call, own), i) for i, (call, own) in enumerate(zip(calls, by_call, strict=True))),
            key=lambda c: (-c[0], c[1]),
        )
        self.order = [i for _, i in counted]
        self.calls = [calls[i] for i in self.order]
        self._each = [by_call[i] for i in self.order]
        self.axes = self._each[0]
        self.rows = [rows for rows, _ in counted]
        self.layout = Layout(self.rows, branches)
        self.mixed, self.total_rows = self.layout.mixed, self.layout.total
        self._single = not self.mixed and self.rows[0] == 1
        self._steps = self._views = is_denoiser(self.target.name)
        self._padding: Padding | None = None
        self._kept: dict[int, Kept] = {}
        self._runs = 0
        self.leaves, structure, self.input_axes = self._unify()
        self.structure = row_lists.for_all_rows(structure, self.axes.listed, self.layout)
        self.uneven = len({lengths(call, own) for call, own in zip(self.calls, self._each, strict=True)}) > 1
        adapted = [call.target.adapted for call in self.calls]
        self.adapters = [BASE if one is None else one.alias for one in adapted]
        self.blended = len(set(self.adapters)) > 1
        self._blend = next((one.blend for one in adapted if one is not None), None) if self.blended else None
        blend = frozenset(one and one.signature for one in adapted) if self.blended else None
        alike = row_lists.in_common(structure, self.axes.listed)
        wide = several(self.leaves[0], self.input_axes, self.rows[0])
        self.kind: Hashable = (
            self.target.key, alike, self.input_axes, wide, axes.pinned, self.mixed, self.layout.by_branch,
            self.uneven, blend,
        )  # fmt: skip

    def _unify(self) -> tuple[list[list[Leaf]], Structure, tuple[LeafAxis, ...]]:
        """The calls' leaves in one structure, the first call's: ragged text is padded where lengths differ."""
        first = self.calls[0]
        if first.language is not None:
            return self._unify_language(first.language)
        self._padding = Padding.of(self.calls, self._each)
        if self._padding is None:
            return [call.leaves for call in self.calls], first.structure, self.axes.inputs
        return self._padding.leaves, self._padding.structure, self._padding.axes

    def _unify_language(self, rule: LanguageRule) -> tuple[list[list[Leaf]], Structure, tuple[LeafAxis, ...]]:
        padded: list[list[Leaf]] = []
        structure: Structure = None
        for arguments in rule.padded(self.calls):
            leaves: list[Leaf] = []
            structure = flatten(arguments, leaves)
            padded.append(leaves)
        return padded, structure, (0,) * len(padded[0])

    def refill(self, calls: Sequence[ModuleCall]) -> bool:
        """Takes the same calls a step later, in the order in which they were given at first.

        Returns:
            Whether it could: not if texts that were padded have changed.
        """
        later = [calls[i] for i in self.order]
        padding = self._padding
        leaves = [call.leaves for call in later] if padding is None else padding.refilled(later)
        if leaves is None:
            return False
        self.leaves = leaves
        self.calls = later
        self.target = later[0].target
        return True

    @property
    def each(self) -> Sequence[Axes]:
        """The axes of each call, in the order of ``calls``."""
        return self._each

    def placed_otherwise(self) -> MergedCall | None:
        """The same calls, their rows by branch; None if that is no other layout than they have."""
        if self.calls[0].language is not None or self.layout.by_branch is not None:
            return None
        other = MergedCall(self.calls, self.axes, self._each, branches=0)
        return None if other.layout.by_branch is None else other

    def by_branches(self, samples: Sequence[int]) -> dict[int, list[int]]:
        """The calls' places as they were given, by how many branches their rows are; 0: not known.

        Args:
            samples: That each one's request asks for, as they were given.
        """
        groups: dict[int, list[int]] = {}
        for rows, place in sorted(zip(self.rows, self.order, strict=True), key=lambda one: one[1]):
            branches, left = divmod(rows, samples[place])
            groups.setdefault(0 if left else branches, []).append(place)
        return groups

    def alike(self) -> list[list[int]]:
        """The calls' places as they were given, by adapters if these differ, else by row count and lengths."""
        groups: dict[Hashable, list[int]] = {}
        for i, place in enumerate(self.order):
            sizes = (self.rows[i], lengths(self.calls[i], self._each[i]))
            groups.setdefault(self.adapters[i] if self.blended else sizes, []).append(place)
        return list(groups.values())

    def run(self, leaves: Sequence[Sequence[Leaf]] | None = None, adapters: Sequence[str] | None = None) -> list[Any]:
        """Runs the real module once on all rows; results in the order of ``calls``.

        Args:
            leaves: Other leaves in place of the calls' own (for verification).
            adapters: Likewise.

        Raises:
            Unsplittable: The result cannot be taken apart by rows.
        """
        if leaves is None:
            merged = self._merged_again()
        else:
            merged = [self._merge([own[i] for own in leaves], axis) for i, axis in enumerate(self.input_axes)]
        arguments, rule = unflatten(self.structure, merged), self.calls[0].language
        args, kwargs = arguments if rule is None else rule.put_together(self.calls[0], arguments)
        started = time.perf_counter()
        if self._blend is None:
            result = self.target.invoke(*args, **kwargs)
        else:
            by_row = self.layout.of_rows(self.adapters if adapters is None else adapters)
            result = self._blend.invoke(self.target.method, by_row, args, kwargs)
        self.forward_s = time.perf_counter() - started
        if rule is None:
            return self._taken_apart(result)
        pieces = zip(self.calls, self._taken_apart(rule.plain(result)), strict=True)
        return [rule.returned(call, piece, self.calls) for call, piece in pieces]

    def _merged_again(self) -> list[Leaf]:
        """The leaves' rows together; what has not changed since the last run is as it was then."""
        merged: list[Leaf] = []
        self._runs += 1
        for i, axis in enumerate(self.input_axes):
            parts = [own[i] for own in self.leaves]
            kept = self._kept.get(i)
            if kept is not None and kept.holds(parts):
                merged.append(kept.whole)
                continue
            whole = self._wholes.find(parts) if self._wholes is not None and axis == 0 and self._single else None
            whole = self._merge(parts, axis) if whole is None else whole
            merged.append(whole)
            # What differs in the second run will differ in all: latents, timesteps.
            if self._runs == 1 and axis is not SHARED and isinstance(whole, torch.Tensor):
                self._kept[i] = Kept(parts, whole)
            elif kept is not None:
                del self._kept[i]
        return merged

    def _taken_apart(self, result: Any) -> list[Any]:
        """The rows of each call in a merged result."""
        outputs: list[Leaf] = []
        structure = flatten(result, outputs)
        if has_opaque(structure):
            raise Unsplittable(f"the result of {self.target.name} holds objects that have no rows")
        axes: Sequence[LeafAxis] = self.axes.outputs or ()
        if self.axes.outputs is None:
            axes = [self._guess(leaf) for leaf in outputs]
        if len(outputs) != len(axes):
            raise Unsplittable(f"the result of {self.target.name} has another structure when merged")
        self._views = self._steps and not has_cache(structure)
        split = [self._split(leaf, axis) for leaf, axis in zip(outputs, axes, strict=True)]
        if is_tuple_of_tensors(structure):
            return list(zip(*split, strict=True))
        return [unflatten(self._own_values(structure, i), [leaf[i] for leaf in split]) for i in range(len(self.calls))]

    def _own_values(self, structure: Any, i: int) -> Structure:
        """The structure of a merged result with call ``i``'s values of lists that have one per row (verdicts)."""
        if not isinstance(structure, Node):
            return structure
        children: Any = structure.children
        if structure.kind is list and children and all(is_value(child) for child in children):
            children = self._split_row_list(list(children))[i]
        own = tuple([self._own_values(child, i) for child in children])
        return Node(structure.kind, structure.context, own)

    def _merge(self, parts: list[Leaf], axis: LeafAxis) -> Leaf:
        if isinstance(parts[0], list):
            lists: list[list[torch.Tensor]] = parts  # pyright: ignore[reportAssignmentType]
            if axis == "rows":
                return self.layout.merged_lists(lists)
            axes = axis if isinstance(axis, tuple) else (axis,) * len(parts[0])
            return [
                lists[0][j] if a is SHARED and lists[0][j].ndim else self._merge_tensors([own[j] for own in lists], a)
                for j, a in enumerate(axes)
            ]
        return self._merge_tensors(parts, axis)  # pyright: ignore[reportArgumentType]

    def _merge_tensors(self, parts: list[torch.Tensor], axis: Any) -> torch.Tensor:
        if axis is SHARED and not is_scalar(parts[0]):
            return parts[0]
        if axis is SHARED:  # a timestep becomes one entry per row
            parts, axis = [part.expand(rows) for part, rows in zip(parts, self.rows, strict=True)], 0
        if self._single:
            return torch.cat(parts, dim=axis)
        return self.layout.merged(parts, axis)

    def _guess(self, leaf: Leaf) -> LeafAxis:
        """The axis of an output that was never probed."""

        def axis(tensor: torch.Tensor) -> Axis:
            return 0 if tensor.ndim and tensor.shape[0] % self.total_rows == 0 else SHARED

        return tuple([axis(tensor) for tensor in leaf]) if isinstance(leaf, list) else axis(leaf)

    def _split(self, leaf: Leaf, axis: LeafAxis) -> list[Leaf]:
        if isinstance(leaf, list):
            if axis == "rows":
                return self._split_row_list(leaf)
            axes = axis if isinstance(axis, tuple) else (axis,) * len(leaf)
            columns = [self._split_tensor(t, a) for t, a in zip(leaf, axes, strict=True)]
            return [[column[i] for column in columns] for i in range(len(self.calls))]
        return list(self._split_tensor(leaf, axis))

    def _split_tensor(self, tensor: torch.Tensor, axis: Any) -> list[torch.Tensor]:
        if not isinstance(axis, int):
            return [tensor] * len(self.calls)
        if axis >= tensor.ndim or tensor.shape[axis] % self.total_rows:
            raise Unsplittable(f"{self.target.name} gave {tuple(tensor.shape)} for {self.total_rows} rows")
        each = tensor.shape[axis] // self.total_rows
        if self._single:  # views do for a step; an encoder's, or a cache's, would keep the mates' memory in use
            views = tensor.split_with_sizes([each] * len(self.calls), dim=axis)
            if not self._views or axis:
                return [view.clone() for view in views]
            if self._wholes is not None:
                self._wholes.note(views, tensor)
            return list(views)
        return self.layout.split(tensor, axis)

    def _split_row_list(self, entries: list[Any]) -> list[Leaf]:
        if len(entries) % self.total_rows:
            raise Unsplittable(f"{self.target.name} gave a list of {len(entries)} for {self.total_rows} rows")
        return list(self.layout.split_list(entries))
