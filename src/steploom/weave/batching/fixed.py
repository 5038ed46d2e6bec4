"""Calls of a fixed size: so that the bits of a row do not depend on who shares its forward.

A kernel is chosen by the sizes of its operands, and one kernel rounds otherwise than another. Horace He and Thinking
Machines Lab, "Defeating Nondeterminism in LLM Inference", 2025, make the kernels invariant; here their sizes are.

Nor are all rows of one forward rounded alike: those do not that fill no vector of the processor, or that another thread
computes. Which these are depends on how many rows there are, and not on what they hold. So a forward of nothing but
copies of one call shows it, and :class:`Places` looks for a number of calls at which all bits are the same.

Where sizes within a forward go by what the rows hold, as those of a mixture of experts do, no number has that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from steploom.errors import GenerationFailed
from steploom.weave.batching.merging import MergedCall
from steploom.weave.calls import Leaf, ModuleCall, pattern
from steploom.weave.machine_faults import is_out_of_memory
from steploom.weave.program import Program
from steploom.weave.verifying.differences import largest_difference
from steploom.weave.verifying.operations import Operations, includes, recorded
from steploom.weave.verifying.verify import company_at_ends, other_company, other_numbers

log = logging.getLogger(__name__)

Group = list[tuple[Program, ModuleCall]]

PLACED = "the bits of a row depend on its place"
"""Why calls run alone of which no number in a forward was found that gives each the same bits."""
BY_VALUES = "rows depend on their mates: operations have other sizes in other company"
"""Why calls run alone whose kernels are chosen by what all rows hold: experts get other numbers of tokens."""
BLOCKS = (4, 8, 16)
"""Of how many rows a forward may hold a multiple, so that threads and vectors compute all rows alike."""
MOST_COPIES = 4
"""Beyond so many times ``max_batch`` no number of calls is tried: each by itself is less work."""
FOUND_KEPT = 4096
"""Sizes of calls for which it is known how many a forward holds."""


def alike(members: Group, size: int) -> list[Group]:
    """The members by what is exactly alike, at most ``size`` at a time.

    Nothing is padded for a mate's sake: neither text of another length nor rows of another count. Nor is a mate's
    adapter there: a layer of adapters computes those rows apart that have the same one.
    """
    groups: dict[Hashable, Group] = {}
    for program, call in members:
        groups.setdefault((call.structure, sizes(call)), []).append((program, call))
    return [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]


class Places:
    """How many calls a forward holds for ``size`` requests, so that the bits of each do not depend on its place.

    Found once for calls of one size, before the first one shares a forward. The last place is always a copy's.

    Args:
        size: Requests of a forward at most.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._found: dict[Hashable, int | str] = {}

    def known(self, call: ModuleCall) -> bool:
        """Whether the number was looked for already for calls of this size."""
        return _kind(call) in self._found

    def filled(self, chunk: Group) -> Group | str:
        """The calls of a forward: these, and copies of the first one; or why each has to run alone."""
        number = self._found[_kind(chunk[0][1])]
        return number if isinstance(number, str) else [*chunk, *[chunk[0]] * (number - len(chunk))]

    def find(
        self,
        member: tuple[Program, ModuleCall],
        rows: int,
        by_values: Callable[[Group], bool],
        alike: Callable[[Group], bool],
    ) -> None:
        """Looks for the number.

        Args:
            member: A call.
            rows: Of it.
            by_values: Whether sizes in a forward of so many copies go by what these hold (:func:`sized_by_values`).
            alike: Whether so many copies of it have the same bits in one forward (:func:`same_in_all_places`).
        """
        if by_values([member] * (self._size + 1)):
            self._keep(member[1], BY_VALUES)
            return
        numbers = [self._size + 1]
        for block in BLOCKS:
            numbers.append(next(n for n in range(self._size + 1, self._size + 1 + block) if n * rows % block == 0))
        tried = [n for n in dict.fromkeys(numbers) if n <= MOST_COPIES * self._size]
        self._keep(member[1], next((number for number in tried if alike([member] * number)), PLACED))

    def _keep(self, call: ModuleCall, found: int | str) -> None:
        if len(self._found) >= FOUND_KEPT:
            self._found.clear()
        self._found[_kind(call)] = found


def sized_by_values(merged: MergedCall, failed: Callable[[Exception], None]) -> bool:
    """Whether sizes within a forward go by what its rows hold.

    Args:
        merged: Of copies of one call.
        failed: Is told what a forward raises.

    Raises:
        Exception: What a forward raises: nothing was found out.
    """
    first: Operations | None = None
    for leaves in (merged.leaves, other_numbers(merged), other_company(merged, 0, merged.axes.pinned)):
        try:
            operations = _operations(merged, leaves)
        except Exception as fault:
            failed(fault)
            raise
        if first is None:
            first = operations
        elif operations != first:
            return True
    assert first is not None
    return any(_otherwise_at_end(merged, first, failed, upper=upper) for upper in (False, True))


def _operations(merged: MergedCall, leaves: list[list[Leaf]]) -> Operations:
    with recorded() as operations:
        merged.run(leaves)
    return operations


def _otherwise_at_end(
    merged: MergedCall, first: Operations, failed: Callable[[Exception], None], *, upper: bool
) -> bool:
    """Whether the first call's operations are not those of ``first`` where the others' timesteps and masks are far off.

    Raises:
        Exception: There was no memory for it.
    """
    try:
        operations = _operations(merged, company_at_ends(merged, upper=upper))
    except Exception as fault:
        if is_out_of_memory(fault):
            failed(fault)
            raise
        log.info("%s does not take what was a guess: %s: %s", merged.target.name, type(fault).__name__, fault)
        return False
    return not includes(operations, first, len(merged.calls))


def same_in_all_places(
    merged: MergedCall, size: int, results: Sequence[Any], failed: Callable[[Exception], None]
) -> bool:
    """Whether copies of one call have the same bits in the first ``size`` places of a forward, and in other company.

    Args:
        merged: Of the copies.
        size: Places that calls of requests may have.
        results: What it gave.
        failed: Is told what a forward with other numbers raises, where zeros would hide how they are added up.

    Raises:
        Exception: There was no memory for it.
    """
    if any(largest_difference(results[0], other) for other in results[1:size]):
        return False
    try:
        others = merged.run(other_numbers(merged))
        company = merged.run(other_company(merged, 0, merged.axes.pinned))
    except Exception as fault:
        failed(fault)
        if is_out_of_memory(fault):
            raise
        return False
    return not (
        largest_difference(results[0], company[0])
        or any(largest_difference(others[0], other) for other in others[1:size])
    )


def own(members: Group) -> Group:
    """The members without copies."""
    first = members[0][0]
    return [members[0], *(member for member in members[1:] if member[0] is not first)]


def tries(fault: Exception) -> int:
    """How often a call is tried at its size: with its mates, then with copies; once more if there was no memory.

    Nothing smaller has its bits, and what held the memory may have been freed meanwhile.
    """
    return 3 if is_out_of_memory(fault) else 2


def too_large(size: int, fault: Exception) -> GenerationFailed:
    """The error of a request for whose forward there is no memory: a smaller one would round otherwise."""
    words = f"batch_invariant=True: there is no memory for a forward of max_batch={size} requests like this one"
    return GenerationFailed(f"{words}; lower max_batch, or the request's size ({fault})")


def _kind(call: ModuleCall) -> Hashable:
    """What the kernels depend on that compute a call: all but the values in it."""
    return (pattern(call.structure), sizes(call))


def sizes(call: ModuleCall) -> Hashable:
    """A call's module, adapter, and the shapes of what it is given."""
    adapted = call.target.adapted
    return (call.target.key, None if adapted is None else adapted.alias, tuple(map(_shape, call.leaves)))


def _shape(leaf: Leaf) -> Hashable:
    if isinstance(leaf, list):
        return tuple((tuple(entry.shape), entry.dtype) for entry in leaf)
    return tuple(leaf.shape), leaf.dtype
