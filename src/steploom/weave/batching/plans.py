"""Plans: how the calls of a batch were grouped and merged, kept for the next tick of the same batch.

A batch whose members do not change makes calls of the same forms in every tick. So it is decided once who runs with
whom, and the merged calls are kept, with what need not be merged again: text embeddings, masks, rotary embeddings.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from steploom.weave.batching.merging import MergedCall
from steploom.weave.calls import ModuleCall
from steploom.weave.forms import Form
from steploom.weave.order import is_denoiser

PLANS_KEPT = 16
"""Each holds the merged text of its batch; those of requests that are gone are dropped."""

Group = Sequence[tuple[object, ModuleCall]]
Draft = Sequence[tuple[MergedCall | None, Group, str]]
"""A merged call, or None: alone; the programs and their calls; why, if alone."""

Part = tuple[MergedCall | None, list[int], str]
"""A merged call, or None: alone; the places of its calls; why, if alone."""


class Plan:
    """How one group of calls was run, so that calls of the same forms can be run like that again.

    Args:
        forms: Of the calls.
    """

    def __init__(self, forms: Sequence[Form]) -> None:
        self.forms = list(forms)
        self.parts: list[Part] = []

    @classmethod
    def of(cls, group: Group, draft: Draft) -> Plan | None:
        """How a group was run; None if its calls cannot be known again."""
        forms = [call.form for _, call in group if call.form is not None and call.form.facts is not None]
        if not draft or len(forms) != len(group) or not is_denoiser(group[0][1].target.name):
            return None
        plan, places = cls(forms), {id(call): i for i, (_, call) in enumerate(group)}
        try:
            for merged, members, reason in draft:
                plan.parts.append((merged, [places[id(call)] for _, call in members], reason))
        except KeyError:  # calls that were made alike
            return None
        return plan

    def fits(self, calls: Sequence[ModuleCall], epoch: int) -> bool:
        """Whether ``calls`` may run as planned; its merged calls are theirs then."""
        for form, call in zip(self.forms, calls, strict=True):
            if form.facts is None or not form.facts.hold(epoch, call.leaves):
                return False
        return all(merged is None or merged.refill([calls[i] for i in places]) for merged, places, _ in self.parts)


class Plans:
    """The newest plans, by the forms of the calls."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[int, ...], Plan] = OrderedDict()

    def find(self, calls: Sequence[ModuleCall], epoch: int) -> Plan | None:
        """The plan for ``calls``, ready to run; None if there is none."""
        key = tuple([id(call.form) for call in calls])  # those of kept plans are alive
        plan = self._kept.get(key)
        if plan is None or not plan.fits(calls, epoch):
            return None
        self._kept.move_to_end(key)
        return plan

    def keep(self, plan: Plan) -> None:
        """Keeps a plan that was carried out."""
        self._kept[tuple(map(id, plan.forms))] = plan
        while len(self._kept) > PLANS_KEPT:
            self._kept.popitem(last=False)

    def forget(self, forms: set[int]) -> None:
        """Drops the plans that have one of the forms with these ids: their program is over."""
        for key in [key for key in self._kept if not forms.isdisjoint(key)]:
            del self._kept[key]

    def clear(self) -> None:
        """Drops all plans: what they rest on was learned anew."""
        self._kept.clear()
