"""Batches: who runs with whom. Calls of one module are grouped by merge keys, merged, verified once, and run.

How a group was run is kept as a plan: as long as the members of a batch do not change, it is not decided again.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Hashable
from typing import Any

from steploom.weave.axes import Axes, AxisBook, guess
from steploom.weave.batching.alike import common_key, completed
from steploom.weave.batching.fixed import Group, own
from steploom.weave.batching.merge_keys import KeyNames, Merger, rows_of, shared_leaves
from steploom.weave.batching.merging import MergedCall
from steploom.weave.batching.plans import Plan, Plans
from steploom.weave.batching.room import Room
from steploom.weave.batching.unlike import BRANCHES, ONLY_ONE, why_alone
from steploom.weave.batching.wholes import Wholes
from steploom.weave.calls import ModuleCall
from steploom.weave.counters import Counters
from steploom.weave.forms import Facts
from steploom.weave.forwards.running import Forwards
from steploom.weave.machine_faults import is_out_of_memory, make_room
from steploom.weave.order import is_denoiser
from steploom.weave.program import Program
from steploom.weave.verifying.verify import Verdicts, checked, pins

log = logging.getLogger(__name__)

KEYS_KEPT = 4096
"""Merge keys that have numbers."""


class Batches:
    """Runs groups of calls of one module, and learns what may be merged.

    Args:
        counters: What is done is counted there.
        tell: Hears of probing and verification, which make a tick longer than others.
        wholes: What was split in this tick and the last one.

    Attributes:
        forwards: How the real modules are run.
        verdicts: What was verified.
        settle: Makes one finding of those of several ranks.
    """

    def __init__(self, counters: Counters, tell: Callable[[str], None], wholes: Wholes) -> None:
        self.forwards = Forwards()
        self.verdicts = Verdicts()
        self.settle: Callable[[Any], Any] = lambda found: found
        self._counters = counters
        self._tell = tell
        self._wholes = wholes
        self._room = Room()
        self._axes = AxisBook()
        self._merger = Merger()
        self._names = KeyNames()
        self._key_numbers: dict[Hashable, int] = {}
        self._epoch = 0
        self._plans = Plans()
        self._draft: list[tuple[MergedCall | None, Group, str]] | None = None

    def forget(self, program: Program) -> None:
        """The program is over: drops what is kept for its batches."""
        self._plans.forget(program.forms)

    def _relearn(self) -> None:
        """Something was learned on which plans may rest."""
        self._epoch += 1
        self._plans.clear()
        self._key_numbers.clear()
        self._draft = None

    def run_again(self, group: Group) -> bool:
        """Runs the group as it was run in an earlier tick; False if it was not, or something has changed."""
        if not is_denoiser(group[0][1].target.name):  # an encoder's calls may be answered from the cache
            return False
        plan = self._plans.find([call for _, call in group], self._epoch)
        if plan is None:
            return False
        self._draft = None
        for (program, _), form in zip(group, plan.forms, strict=True):
            assert form.facts is not None
            program.note(form.facts)
        for merged, places, reason in plan.parts:
            members = [group[i] for i in places]
            if merged is None:
                self._run_alone(members, reason)
            else:
                self._run_merged(merged, [members[i] for i in merged.order], verified=True)
        return True

    def run(self, group: Group) -> None:
        """Runs the calls: merged where keys are equal, else alone. Keeps how, for the next tick."""
        self._draft = []
        self._run_grouped(group)
        draft, self._draft = self._draft, None
        plan = Plan.of(group, draft or ())
        if plan is not None:
            self._plans.keep(plan)

    def _run_grouped(self, group: Group) -> None:
        by_key: dict[int, Group] = {}
        found: dict[int, Axes] = {}
        group = self._alike(group)
        for program, call in group:
            facts = self._known(call)
            axes = self._find_axes(program, call) if facts is None else facts.axes
            if axes is None:
                continue  # it has failed
            key = self._key(program, call, axes) if facts is None else program.note(facts)
            by_key.setdefault(key, []).append((program, call))
            found[key] = axes
        for key, members in by_key.items():
            reason = found[key].reason or ONLY_ONE
            if len(members) == 1 and reason == ONLY_ONE:
                (_, call), mates = members[0], [other for _, other in group if other is not members[0][1]]
                reason = why_alone(call, mates, found[key], self._merger.token)
            self.run_members(members, reason)

    def _alike(self, group: Group) -> Group:
        """The group, its calls without additions in the form of those with, once the axes of these are known."""
        calls = [call for _, call in group]
        made: Group = []
        for program, call in group:
            found = completed(call, calls) if len(group) > 1 else None
            axes = None if found is None else self._axes.find(found[1])
            made.append((program, call if found is None or axes is None or axes.reason is not None else found[0]))
        return made

    def _key(self, program: Program, call: ModuleCall, axes: Axes) -> int:
        """The number of a call's merge key; what was found is noted with the call's form."""
        mergeable = axes.reason is None
        key: tuple[Hashable, ...] = (id(program),)
        common = key
        if mergeable:
            try:
                key = self._merger.key(call, axes)
                common = key if not is_denoiser(call.target.name) else self._merger.key(*common_key(call, axes))
            except Exception as fault:  # noqa: BLE001 - a call that cannot even be compared runs alone
                log.warning("a call of %s cannot be compared with others: %s", call.target.name, fault)
                mergeable = False
        facts = Facts(self._epoch, axes, self._number(key), shared_leaves(call, axes) if mergeable else {})
        if is_denoiser(call.target.name):
            shared = (call.target.group, *common[1:])  # those whose adapters keep them apart share ticks all the same
            facts.batch_key = self._names.name(shared, call) if mergeable else f"{call.target.name}:alone"
            facts.rows = rows_of(call.leaves, axes) if mergeable else 0
            program.holdings.add(call.leaves, program.steps)
            program.note(facts)
        if call.form is not None:
            call.form.facts = facts
        return facts.key

    def _number(self, key: Hashable) -> int:
        """A number for a merge key, which is large; the same for equal keys until something is learned."""
        if len(self._key_numbers) >= KEYS_KEPT:
            self._relearn()
        return self._key_numbers.setdefault(key, len(self._key_numbers))

    def _known(self, call: ModuleCall) -> Facts | None:
        """What is known of the form of ``call``, if it still holds."""
        facts = None if call.form is None else call.form.facts
        return facts if facts is not None and facts.hold(self._epoch, call.leaves) else None

    def _find_axes(self, program: Program, call: ModuleCall) -> Axes | None:
        """Axes of ``call``; None if it fails. The first call of a pattern is run by itself here, and probed.

        It shares a forward with the others all the same. What it gave by itself counts only if nobody shares with it.
        """
        axes = self._axes.find(call)
        if axes is not None:
            return axes
        self._draft = None
        if call.language is not None:
            return self._axes.put(call, Axes((0,) * len(call.leaves)))
        if not is_denoiser(call.target.name):
            return self._axes.put(call, Axes(guess(call)))
        self._answer(program, call)
        if program.fault is not None:
            self._count_alone(program, call, ONLY_ONE)
            return None
        self._tell(f"learning the batch axes of {call.target.name}")
        with self._counters.warming():
            axes = self._axes.probe(call, program.answer, program.doubled())
        if axes.reason is not None:
            log.warning("calls of %s are not merged: %s", call.target.name, axes.reason)
        return axes

    def run_members(self, members: Group, reason: str = ONLY_ONE, branches: int | None = None) -> None:
        """Runs calls that share a key as one forward, if their kind of merge holds: end to end, or by branch."""
        if len(members) == 1:
            self._run_alone(members, reason)
            return
        merged = self._merged(members, branches)
        if merged is None:
            self._run_alone(members, "the calls could not be put together")
            return
        refusal = self.verdicts.refusal(merged)
        if refusal is not None:
            self._run_otherwise(merged, members, refusal, branches)
            return
        if not self._room.has(merged):
            self._run_halves(members)
            return
        if self._draft is not None:
            self._draft.append((merged, members, ""))
        self._run_merged(merged, [members[i] for i in merged.order])

    def _run_halves(self, members: Group) -> None:
        middle = len(members) // 2
        for half in (members[:middle], members[middle:]):
            self.run_members(half, "a merged call failed")

    def _run_otherwise(self, merged: MergedCall, members: Group, refusal: str, branches: int | None) -> None:
        """Runs calls whose kind of merge does not hold: by branch, else with those that are just alike, else alone."""
        if merged.mixed and branches is None and merged.calls[0].language is None:
            groups = merged.by_branches([program.samples for program, _ in members])
            for found, places in groups.items():
                self.run_members([members[i] for i in places], refusal if len(groups) == 1 else BRANCHES, found)
        elif merged.mixed or merged.uneven or merged.blended:
            for alike in merged.alike():
                self.run_members([members[i] for i in alike], refusal)
        else:
            self._run_alone(members, refusal)

    def _merged(self, members: Group, branches: int | None = None) -> MergedCall | None:
        """The members' calls as one; None if they cannot be put together, which is no reason for anybody to fail."""
        calls = [call for _, call in members]
        axes = [self._axes.find(call) or Axes() for call in calls]
        try:
            return MergedCall(calls, axes[0], axes, self._wholes, branches)
        except Exception as fault:  # noqa: BLE001 - equal keys promised that it can be done: then call by call
            log.warning("calls of %s cannot be put together: %s: %s", calls[0].target.name, type(fault).__name__, fault)
            return None

    def _run_merged(self, merged: MergedCall, members: Group, *, verified: bool = False, failed: int = 0) -> None:
        known = verified or self.verdicts.known(merged)
        try:
            results = self.forwards.merged(merged, known=known)
        except Exception as fault:  # noqa: BLE001 - whatever a module or a hook on it raises: then call by call
            self._run_apart(merged, members, fault, failed + 1)
            return
        self.forwards.count(merged.forward_s, self._counters)
        if not known and not self._passes(merged, members, results, failed):
            return
        self.verdicts.passed(merged)
        self._room.sufficed(merged)
        real = own(members)
        self._counters.merged_calls += 1
        self._counters.forward(merged.target.name, len(real))
        for (program, _), result in zip(real, results, strict=False):
            program.answer = result
            program.shared(merged.target.name, len(real))

    def _passes(self, merged: MergedCall, members: Group, results: list[Any], failed: int) -> bool:
        """Checks the first merge of a kind. If it does not pass, its calls are run otherwise, here."""
        self._draft = None
        self._tell(f"verifying merged calls of {merged.target.name}")
        try:
            with self._counters.warming():
                reason = self.settle(checked(merged, results, self.forwards.failed))
                pins_apply = reason is not None and not merged.axes.pinned
                pinned = frozenset[int](self.settle(sorted(pins(merged, results))) if pins_apply else ())
        except Exception as fault:
            if not is_out_of_memory(fault):
                raise
            self._run_apart(merged, members, fault, failed + 1)  # nothing was found out: a smaller one may be checked
            return False
        if not pinned:
            self.verdicts.record(merged, reason)
        if reason is None:
            return True
        if pinned:  # merged from now on with calls that agree in these
            self._axes.put(merged.calls[0], dataclasses.replace(merged.axes, pinned=pinned))
        else:
            log.warning("calls of %s are not merged like this: %s", merged.target.name, reason)
        self._relearn()
        (self.run if pinned else self.run_members)(own(members))
        return False

    def _run_apart(self, merged: MergedCall, members: Group, fault: Exception, failed: int) -> None:
        """A merged call failed: halves, down to single calls, so that only the culprit's request fails."""
        self._draft = None
        make_room(fault)
        if is_out_of_memory(fault):
            if is_denoiser(merged.target.name):
                self._counters.overflowed(merged.total_rows)
            else:
                self._room.overflowed(merged)
        self._run_halves(members)
        if self._innocent(members, fault) and self.verdicts.doubt(merged):
            self._refuse(merged, fault)

    def _innocent(self, members: Group, fault: Exception) -> bool:
        """Whether none of the calls was at fault when they failed together."""
        return not (is_out_of_memory(fault) or any(program.fault for program, _ in members))

    def _refuse(self, merged: MergedCall, fault: Exception) -> None:
        """Never merges this kind again."""
        reason = f"the merged call raised {type(fault).__name__}: {fault}"
        log.warning("calls of %s are not merged: %s", merged.target.name, reason)
        self.verdicts.record(merged, reason)
        self._relearn()

    def _run_alone(self, members: Group, reason: str) -> None:
        if self._draft is not None:
            self._draft.append((None, members, reason))
        for program, call in members:
            if program.answer is None:  # else it was run to learn its axes
                self._answer(program, call)
            self._count_alone(program, call, reason)

    def _answer(self, program: Program, call: ModuleCall) -> None:
        """Runs a call by itself."""
        started = time.perf_counter()
        try:
            program.answer = self.forwards.alone(call)
        except Exception as fault:  # noqa: BLE001 - thrown into the program, whose request it concerns
            program.fault = fault
            make_room(fault)
        self.forwards.count(time.perf_counter() - started, self._counters)

    def _count_alone(self, program: Program, call: ModuleCall, reason: str) -> None:
        self._counters.alone(call.target.name, reason)
        program.shared(call.target.name, 1)
