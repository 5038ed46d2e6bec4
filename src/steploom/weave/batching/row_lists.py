"""Lists of Python values with an entry for each row, such as the sizes of each row's picture.

They belong to a call's structure and must be equal to be merged; where all entries are one and the same, calls of any
number of rows have that one in common.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from steploom.weave.batching.layouts import Layout
from steploom.weave.calls import Node, Structure, is_plain

Path = tuple[int, ...]
"""Where something is in a structure: which child of which child."""

_EACH_ROW = "each row"
"""Marks a list that stands for as many of its one entry as there are rows."""


def doubled(one: Structure, two: Structure, path: Path = ()) -> frozenset[Path]:
    """The lists of values that have entries per row, from the same call's structures with one and with two samples."""
    if not isinstance(one, Node) or not isinstance(two, Node) or one.kind is not two.kind:
        return frozenset()
    if one.kind is list and is_plain(one) and 0 < 2 * len(one.children) == len(two.children):
        return frozenset([path])
    pairs = enumerate(zip(one.children, two.children, strict=False))
    return frozenset(found for i, (a, b) in pairs for found in doubled(a, b, (*path, i)))


def in_common(structure: Structure, paths: frozenset[Path]) -> Structure:
    """What a call has in common with calls of other numbers of rows: of such lists of one and the same, one entry."""

    def shorten(node: Node) -> Node:
        return Node(list, _EACH_ROW, node.children[:1]) if _uniform(node) else node

    return _changed(structure, paths, shorten)


def for_all_rows(structure: Structure, paths: frozenset[Path], layout: Layout) -> Structure:
    """The structure of merged calls, from that of the first one: such lists have an entry for every row."""

    def lengthen(node: Node) -> Node:
        entries = list(node.children)
        if _uniform(node):
            entries = entries[:1] * layout.total
        elif len(entries) == layout.rows[0]:  # the same in all calls, which therefore bring as many
            entries = layout.merged_lists([entries] * len(layout.rows))
        return Node(list, node.context, tuple(entries))

    return _changed(structure, paths, lengthen)


def _uniform(node: Node) -> bool:
    return bool(node.children) and all(child == node.children[0] for child in node.children)


def _changed(structure: Any, paths: frozenset[Path], change: Callable[[Node], Node], path: Path = ()) -> Structure:
    if path in paths and isinstance(structure, Node):
        return change(structure)
    if not paths or not isinstance(structure, Node):
        return structure
    children = tuple([_changed(child, paths, change, (*path, i)) for i, child in enumerate(structure.children)])
    return Node(structure.kind, structure.context, children)
