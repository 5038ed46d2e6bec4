"""Calls of a fixed size: so that the bits of a row do not depend on who shares its forward.

A kernel is chosen by the sizes of its operands, and one kernel rounds otherwise than another. Horace He and Thinking
Machines Lab, "Defeating Nondeterminism in LLM Inference", 2025, make the kernels invariant; here their sizes are.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator

from steploom.errors import GenerationFailed
from steploom.weave.calls import Leaf, ModuleCall
from steploom.weave.machine_faults import is_out_of_memory
from steploom.weave.program import Program

Group = list[tuple[Program, ModuleCall]]


def filled_up(members: Group, size: int) -> Iterator[tuple[Group, Group]]:
    """The members by what is exactly alike, at most ``size`` at a time; each also with copies of its first one.

    Nothing is padded for a mate's sake: neither text of another length nor rows of another count. Nor is a mate's
    adapter there: a layer of adapters computes those rows apart that have the same one. And the last place is a copy's:
    where the rows do not fill a vector of the processor, its last elements are rounded otherwise than the others.
    """
    alike: dict[Hashable, Group] = {}
    for program, call in members:
        adapted = call.target.adapted
        alias = None if adapted is None else adapted.alias
        kind = (call.target.key, alias, call.structure, tuple(map(_shape, call.leaves)))
        alike.setdefault(kind, []).append((program, call))
    for group in alike.values():
        for start in range(0, len(group), size):
            chunk = group[start : start + size]
            yield chunk, [*chunk, *[chunk[0]] * (size + 1 - len(chunk))]


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


def _shape(leaf: Leaf) -> Hashable:
    if isinstance(leaf, list):
        return tuple((tuple(entry.shape), entry.dtype) for entry in leaf)
    return tuple(leaf.shape), leaf.dtype
