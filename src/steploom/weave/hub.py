"""The hub: resumes programs, gathers the module calls that they suspend on, runs each group once, hands out the rows.

One call of :meth:`Hub.tick` advances each program by at most one step of its own loop.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from steploom.weave.alike import common_key, completed
from steploom.weave.axes import Axes, AxisBook, guess
from steploom.weave.calls import ModuleCall, has_opaque
from steploom.weave.encode_cache import EncodeCache
from steploom.weave.forwards import Forwards
from steploom.weave.merge_keys import Merger, rows_of
from steploom.weave.merging import MergedCall
from steploom.weave.order import CallOrder, is_denoiser
from steploom.weave.program import Program
from steploom.weave.verify import Verdicts, check, pins

log = logging.getLogger(__name__)

CALLS_PER_TICK = 8
"""Calls of one module by one program in one tick; a program without steps goes on in the next tick."""


@dataclasses.dataclass
class Counters:
    """What the hub did since its start; seconds of the tick in progress.

    ``denoiser_forwards`` is how many denoiser forwards carried how many requests.
    """

    merged_calls: int = 0
    denoiser_forwards: dict[int, int] = dataclasses.field(default_factory=dict)
    alone_calls: dict[str, int] = dataclasses.field(default_factory=dict)
    alone_this_tick: dict[str, int] = dataclasses.field(default_factory=dict)
    forward_s: float = 0.0
    warmup_s: float = 0.0


Group = list[tuple[Program, ModuleCall]]


class Hub:
    """Runs programs against the shared modules of one pipeline. All of it on one thread.

    Args:
        encode_cache_bytes: Bytes of text-encoder results that are kept.
        tell: Hears of probing and verification, which make a tick longer than others.
    """

    def __init__(self, encode_cache_bytes: int, tell: Callable[[str], None] = lambda line: None) -> None:
        self._tell = tell
        self.forwards = Forwards()
        self.cache = EncodeCache(encode_cache_bytes)
        self.verdicts = Verdicts()
        self.counters = Counters()
        self._axes = AxisBook()
        self._merger = Merger()
        self._order = CallOrder()
        self._key_names: dict[Hashable, str] = {}

    def tick(self, programs: Sequence[Program]) -> None:
        """Advances each program to the end of its next step, or of its pipeline call."""
        self.counters.forward_s = self.counters.warmup_s = 0.0
        self.counters.alone_this_tick = {}
        with torch.no_grad():  # not inference_mode: pipelines update in place what the hub returned
            for program in programs:
                program.shared_with, program.last_module, program.step_end = [], None, None
                program.calls_made = {program.call.target.name: 1} if program.call else {}
                if program.call is None:
                    self._resume(program)
            self._advance(programs, denoise=True)
            for program in programs:
                if program.step_end is not None and program.witness is not None:
                    program.witness()
            # After its last step a program decodes in the same tick: it would only take a place in the next one.
            # One that cannot say which step is the last runs on to its next call, or to its end.
            finishing = [p for p in programs if p.step_end and (p.phase == "decode" or p.watcher.open_ended)]
            for program in finishing:
                program.last_module = (
                    None  # a VAE that decodes would seem to lead to the ControlNet that it encodes for
                )
                self._resume(program)
            self._advance(finishing, denoise=False)

    def _advance(self, programs: Sequence[Program], *, denoise: bool) -> None:
        """Runs what the programs wait for until none waits for anything that may run in this tick."""
        while group := self._next_group(programs, denoise):
            self._run(group)
            for program, _ in group:
                self._resume(program)

    def _resume(self, program: Program) -> None:
        """Runs the program's own code up to its next stop."""
        answer, fault, program.answer, program.fault = program.answer, program.fault, None, None
        steps = program.steps
        program.resume(answer, fault)
        for name, reason in program.take_unshared():
            self._count_alone(name, reason)
            self._note_shared(program, name, 1)
        if program.call is not None:
            name = program.call.target.name
            program.watcher.called(program.call)
            program.calls_made[name] = program.calls_made.get(name, 0) + 1
            self._order.saw(program.last_module, name)
            program.last_module = name
            if program.phase == "encode" and is_denoiser(name):
                program.enter("denoise")
        elif program.steps > steps:
            program.enter("decode" if program.steps == program.watcher.total_steps else "denoise")

    def _next_group(self, programs: Sequence[Program], denoise: bool) -> Group:
        """The pending calls of one module that no other scheduled program can still join in this tick."""
        pending = [(p, p.call) for p in programs if p.call and p.calls_made[p.call.target.name] <= CALLS_PER_TICK]
        if not denoise:
            pending = [(program, call) for program, call in pending if not is_denoiser(call.target.name)]
        if not pending:
            return []
        name = self._order.first({call.target.name for _, call in pending})
        return [(program, call) for program, call in pending if call.target.name == name]

    def _run(self, group: Group) -> None:
        """Answers every call of the group; identical text-encoder calls are run once."""
        self.cache.look_again()
        firsts: dict[Hashable, Program] = {}
        fresh: Group = []
        repeats: list[tuple[Hashable, Program, ModuleCall]] = []
        for program, call in group:
            key = self.cache.key(call)
            if key in firsts:
                repeats.append((key, program, call))
                continue
            program.answer = None if key is None else self.cache.get(key)
            if program.answer is None:
                fresh.append((program, call))
                if key is not None:
                    firsts[key] = program
        self._run_fresh(fresh)
        for key, program in firsts.items():
            if program.fault is None:
                self.cache.put(key, program.answer)
        for key, program, call in repeats:
            first = firsts[key]
            program.answer = None if first.fault is not None else self.cache.repeat(first.answer)
            if program.answer is None:  # not plain tensors, or failed
                self._run_members([(program, call)])

    def _run_fresh(self, group: Group) -> None:
        """Runs the calls: merged where keys are equal, else alone."""
        by_key: dict[Hashable, Group] = {}
        reasons: dict[Hashable, str] = {}
        group = self._alike(group)
        for program, call in group:
            axes = self._find_axes(program, call)
            if axes is None:
                continue  # probing has answered it
            key = self._key(program, call, axes)
            by_key.setdefault(key, []).append((program, call))
            reasons[key] = axes.reason or _why_alone(group, call)
        for key, members in by_key.items():
            self._run_members(members, reasons[key])

    def _alike(self, group: Group) -> Group:
        """The group, its calls without additions in the form of those with, once the axes of these are known."""
        calls = [call for _, call in group]
        made: Group = []
        for program, call in group:
            found = completed(call, calls) if len(group) > 1 else None
            axes = None if found is None else self._axes.find(found[1])
            made.append((program, call if found is None or axes is None or axes.reason is not None else found[0]))
        return made

    def _key(self, program: Program, call: ModuleCall, axes: Axes) -> Hashable:
        """The merge key of a call; noted as the program's batch key if it is a denoiser's."""
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
        if is_denoiser(call.target.name):
            shared = (call.target.group, *common[1:])  # those whose adapters keep them apart share ticks all the same
            program.batch_key = self._name_key(shared, call) if mergeable else f"{call.target.name}:alone"
            program.rows = rows_of(call.leaves, axes) if mergeable else 0
        return key

    def _find_axes(self, program: Program, call: ModuleCall) -> Axes | None:
        """Axes of ``call``. The first call of a pattern is run here, alone, and probed: then None."""
        axes = self._axes.find(call)
        if axes is not None:
            return axes
        if call.language is not None:
            return self._axes.put(call, Axes((0,) * len(call.leaves)))
        if not is_denoiser(call.target.name):
            return self._axes.put(call, Axes(guess(call)))
        self._run_members([(program, call)], "the batch axes were being learned")
        if program.fault is None:
            started = time.perf_counter()
            self._tell(f"learning the batch axes of {call.target.name}")
            axes = self._axes.probe(call, program.answer, program.doubled())
            self.counters.warmup_s += time.perf_counter() - started
            if axes.reason is not None:
                log.warning("calls of %s are not merged: %s", call.target.name, axes.reason)
            self._key(program, call, axes)
        return None

    def _run_members(self, members: Group, reason: str = "only one") -> None:
        """Runs calls that share a key as one forward, if their kind of merge holds."""
        if len(members) == 1:
            self._run_alone(members, reason)
            return
        merged = self._merged(members)
        if merged is None:
            self._run_alone(members, "the calls could not be put together")
            return
        refusal = self.verdicts.refusal(merged)
        if refusal is not None and (merged.mixed or merged.uneven or merged.blended):
            for alike in merged.alike():
                self._run_members([members[i] for i in alike], refusal)
            return
        if refusal is not None:
            self._run_alone(members, refusal)
            return
        self._run_merged(merged, [members[i] for i in merged.order])

    def _merged(self, members: Group) -> MergedCall | None:
        """The members' calls as one; None if they cannot be put together, which is no reason for anybody to fail."""
        calls = [call for _, call in members]
        axes = [self._axes.find(call) or Axes() for call in calls]
        try:
            return MergedCall(calls, axes[0], axes)
        except Exception as fault:  # noqa: BLE001 - equal keys promised that it can be done: then call by call
            log.warning("calls of %s cannot be put together: %s: %s", calls[0].target.name, type(fault).__name__, fault)
            return None

    def _run_merged(self, merged: MergedCall, members: Group) -> None:
        try:
            results = self.forwards.merged(merged, known=self.verdicts.known(merged))
        except Exception as fault:  # noqa: BLE001 - whatever a module or a hook on it raises: then call by call
            self._run_apart(merged, members, fault)
            return
        self.forwards.count(merged.forward_s, self.counters)
        if not self.verdicts.known(merged):
            started = time.perf_counter()
            self._tell(f"verifying merged calls of {merged.target.name}")
            reason = _checked(merged, results)
            pinned = frozenset[int]() if reason is None or merged.axes.pinned else pins(merged, results)
            if pinned:  # merged from now on with calls that agree in these
                self._axes.put(merged.calls[0], dataclasses.replace(merged.axes, pinned=pinned))
                self._run_fresh(members)
                self.counters.warmup_s += time.perf_counter() - started
                return
            self.verdicts.record(merged, reason)
            self.counters.warmup_s += time.perf_counter() - started
            if reason is not None:
                log.warning("calls of %s are not merged: %s", merged.target.name, reason)
                self._run_members(members)
                return
        self.counters.merged_calls += 1
        self._count_forward(merged.target.name, len(members))
        for (program, _), result in zip(members, results, strict=True):
            program.answer = result
            self._note_shared(program, merged.target.name, len(members))

    def _run_apart(self, merged: MergedCall, members: Group, fault: Exception) -> None:
        """A merged call failed: halves, down to single calls, so that only the culprit's request fails."""
        middle = len(members) // 2
        for half in (members[:middle], members[middle:]):
            self._run_members(half, "a merged call failed")
        innocent = all(program.fault is None for program, _ in members)
        if innocent and not isinstance(fault, torch.OutOfMemoryError):
            reason = f"the merged call raised {type(fault).__name__}: {fault}"
            log.warning("calls of %s are not merged: %s", merged.target.name, reason)
            self.verdicts.record(merged, reason)

    def _run_alone(self, members: Group, reason: str) -> None:
        for program, call in members:
            started = time.perf_counter()
            try:
                program.answer = self.forwards.alone(call)
            except Exception as fault:  # noqa: BLE001 - thrown into the program, whose request it concerns
                program.fault = fault
            self.forwards.count(time.perf_counter() - started, self.counters)
            self._count_alone(call.target.name, reason)
            self._note_shared(program, call.target.name, 1)

    def _count_alone(self, name: str, reason: str) -> None:
        counters = self.counters
        counters.alone_calls[reason] = counters.alone_calls.get(reason, 0) + 1
        if reason != "only one":
            counters.alone_this_tick[reason] = counters.alone_this_tick.get(reason, 0) + 1
        self._count_forward(name, 1)

    def _count_forward(self, name: str, requests: int) -> None:
        if is_denoiser(name):
            counts = self.counters.denoiser_forwards
            counts[requests] = counts.get(requests, 0) + 1

    def _note_shared(self, program: Program, name: str, requests: int) -> None:
        if is_denoiser(name):
            program.shared_with.append(requests)

    def _name_key(self, key: Hashable, call: ModuleCall) -> str:
        """A short name for a merge key, stable for the life of the process."""
        if has_opaque(call.structure):  # equal to nobody's; a name would keep it alive
            return f"{call.target.name}:alone"
        name = self._key_names.get(key)
        if name is None:
            first = next((leaf for leaf in call.leaves if isinstance(leaf, torch.Tensor) and leaf.ndim > 1), None)
            sizes = "" if first is None else "x".join(map(str, first.shape[1:]))
            name = self._key_names[key] = f"{call.target.name}:{sizes}#{len(self._key_names)}"
        return name


def _why_alone(group: Group, call: ModuleCall) -> str:
    """Why a call that could be merged is not, if it is not."""
    if len(group) == 1:
        return "only one"
    if has_opaque(call.structure):
        return "an argument is an object of its own, such as a cache that the module writes"
    return "nothing alike to share with"


def _checked(merged: MergedCall, results: Sequence[Any]) -> str | None:
    """Why this kind must not be merged; a check that fails is such a reason."""
    try:
        return check(merged, results)
    except Exception as fault:  # noqa: BLE001 - the module runs on other rows here, and may raise anything
        return f"the check raised {type(fault).__name__}: {fault}"
