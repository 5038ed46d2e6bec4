"""Batches whose calls have the same bits in any company: all forwards hold as many, with copies for those missing."""

from __future__ import annotations

import logging
from collections.abc import Callable

from steploom.weave.batching.batches import Batches
from steploom.weave.batching.fixed import (
    Group,
    Places,
    alike,
    own,
    same_in_all_places,
    sized_by_values,
    too_large,
    tries,
)
from steploom.weave.batching.merging import MergedCall
from steploom.weave.batching.unlike import ONLY_ONE
from steploom.weave.batching.wholes import Wholes
from steploom.weave.calls import ModuleCall, has_opaque
from steploom.weave.counters import Counters
from steploom.weave.machine_faults import is_out_of_memory, make_room
from steploom.weave.program import Program

log = logging.getLogger(__name__)


class InvariantBatches(Batches):
    """Runs calls in forwards of a fixed size, of one row count and length, so that bits do not depend on company.

    Args:
        counters: As of :class:`~steploom.weave.batching.batches.Batches`.
        tell: Likewise.
        wholes: Likewise.
        size: For how many calls a forward is: copies of the first one make up for those that are missing. 1: nothing is
            merged.
    """

    def __init__(self, counters: Counters, tell: Callable[[str], None], wholes: Wholes, size: int) -> None:
        super().__init__(counters, tell, wholes)
        self._size = size
        self._places = Places(size)

    def run_members(self, members: Group, reason: str = ONLY_ONE, branches: int | None = None) -> None:
        """Runs calls that share a key, with those that are exactly alike."""
        self._run_fixed(members, reason)

    def _alike(self, group: Group) -> Group:
        return group

    def _run_fixed(self, members: Group, reason: str, *, failed: int = 0) -> None:
        """Runs calls that share a key in merged calls of a fixed size, each with those that are exactly alike."""
        call, size = members[0][1], self._size
        axes = self._axes.find(call)
        if size == 1 or axes is None or axes.reason is not None or call.language or has_opaque(call.structure):
            self._run_alone(members, reason)
            return
        chunks = alike(members, size)
        for number, chunk in enumerate(chunks):
            one = self._merged([chunk[0]] * 2)
            refusal = "the calls could not be put together" if one is None else self.verdicts.refusal(one)
            rest = [member for later in chunks[number:] for member in later][1:]
            if one is None or refusal is not None:
                self._run_alone(chunk, refusal or reason)
            elif rest and not self.verdicts.known(one):  # with copies alone, so that who comes first learns the same
                self._run_fixed(chunk[:1], reason, failed=failed)
                self.run(rest)
                return
            else:
                self._run_filled(one, chunk, failed)

    def _run_filled(self, one: MergedCall, chunk: Group, failed: int) -> None:
        """Runs calls that are exactly alike in a forward of as many as give each the same bits in any place."""
        try:
            self._find_places(one, chunk[0])
        except Exception as fault:  # noqa: BLE001 - whatever a module or a hook on it raises: nothing was found out
            self._run_apart(one, chunk, fault, failed + 1)
            return
        filled = self._places.filled(chunk)
        if isinstance(filled, str):
            self._run_alone(chunk, filled)
            return
        merged = self._merged(filled)
        if merged is None:
            self._run_alone(chunk, "the calls could not be put together")
            return
        if self._draft is not None:
            self._draft.append((merged, filled, ""))
        self._run_merged(merged, filled, failed=failed)

    def _find_places(self, one: MergedCall, member: tuple[Program, ModuleCall]) -> None:
        """Finds out, once for calls of this size, how many a forward holds."""
        if self._places.known(member[1]):
            return

        def by_values(copies: Group) -> bool:
            merged = MergedCall([call for _, call in copies], one.axes)
            return self.settle(sized_by_values(merged, self.forwards.failed))

        def same(copies: Group) -> bool:
            merged = MergedCall([call for _, call in copies], one.axes)
            results = self.forwards.merged(merged, known=False)
            return self.settle(same_in_all_places(merged, self._size, results, self.forwards.failed))

        self._tell(f"comparing the places in a forward of {one.target.name}")
        with self._counters.warming():
            self._places.find(member, one.rows[0], by_values, same)

    def _run_apart(self, merged: MergedCall, members: Group, fault: Exception, failed: int) -> None:
        """A merged call failed: each of its calls again, at the same size. Halves would have other bits."""
        self._draft = None
        make_room(fault)
        if failed >= tries(fault):
            self._give_up(merged, members, fault)
            return
        log.warning("%s runs again call by call: %s: %s", merged.target.name, type(fault).__name__, fault)
        for member in own(members):
            self._run_fixed([member], "a merged call failed", failed=failed)

    def _give_up(self, merged: MergedCall, members: Group, fault: Exception) -> None:
        """A call with its own copies for company fails again and again: no smaller forward has its bits."""
        program = members[0][0]
        oom = is_out_of_memory(fault)
        if oom or self.verdicts.known(merged):
            program.fault = too_large(self._size, fault) if oom else fault
            self._counters.alone(merged.target.name, "a merged call failed")
        else:  # nobody has bits of this kind yet
            self._run_alone(members[:1], "a merged call failed")
            if self._innocent(members, fault):
                self._refuse(merged, fault)
