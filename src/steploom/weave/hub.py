"""The hub: resumes programs, gathers the module calls that they suspend on, runs each group once, hands out the rows.

One call of :meth:`Hub.tick` advances each program by at most one step of its own loop.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from steploom.weave import solvers
from steploom.weave.batches import Batches, Group
from steploom.weave.calls import ModuleCall
from steploom.weave.counters import Counters
from steploom.weave.encode_cache import EncodeCache
from steploom.weave.order import CallOrder, is_denoiser
from steploom.weave.program import Program
from steploom.weave.wholes import Wholes

log = logging.getLogger(__name__)

CALLS_PER_TICK = 8
"""Calls of one module by one program in one tick; a program without steps goes on in the next tick."""


class Hub:
    """Runs programs against the shared modules of one pipeline. All of it on one thread.

    Args:
        encode_cache_bytes: Bytes of text-encoder results that are kept.
        tell: Hears of probing and verification, which make a tick longer than others.
    """

    def __init__(self, encode_cache_bytes: int, tell: Callable[[str], None] = lambda line: None) -> None:
        self.cache = EncodeCache(encode_cache_bytes)
        self.counters = Counters()
        self._wholes = Wholes()
        self.batches = Batches(self.counters, tell, self._wholes)
        self._order = CallOrder()

    def tick(self, programs: Sequence[Program]) -> None:
        """Advances each program to the end of its next step, or of its pipeline call."""
        self.counters.begin_tick()
        self._wholes.begin_tick()
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
        self._take_steps([program for program in programs if program.due is not None])

    def _take_steps(self, programs: Sequence[Program]) -> None:
        """Takes the steps that are due: those of one kind of noise scheduler as one update of all rows."""
        alike: dict[Hashable, list[Program]] = {}
        for program in programs:
            assert program.due is not None
            alike.setdefault(program.due.rows.key, []).append(program)
        for members in alike.values():
            answers = _taken_together(members, self._wholes) or [None] * len(members)
            for program, answer in zip(members, answers, strict=True):
                program.take_step(answer)

    def _resume(self, program: Program) -> None:
        """Runs the program's own code up to its next stop. A call that its step cache answers is none."""
        if program.step_cache is not None:
            program.step_cache.learn(program)
        self._resume_once(program)
        while program.step_cache is not None and program.step_cache.answer(program):
            self._resume_once(program)

    def _resume_once(self, program: Program) -> None:
        answer, fault, program.answer, program.fault = program.answer, program.fault, None, None
        program.resume(answer, fault)
        for name, reason in program.take_unshared():
            self.counters.alone(name, reason)
            program.shared(name, 1)
        call = program.call
        if call is not None:
            name = call.target.name
            program.forms.add(id(call.form))
            program.watcher.called(call)
            program.calls_made[name] = program.calls_made.get(name, 0) + 1
            self._order.saw(program.last_module, name)
            program.last_module = name
            if program.phase == "encode" and is_denoiser(name):
                program.enter("denoise")

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
        if self.batches.run_again(group):
            return
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
        self.batches.run(fresh)
        for key, program in firsts.items():
            if program.fault is None:
                self.cache.put(key, program.answer)
        for key, program, call in repeats:
            first = firsts[key]
            program.answer = None if first.fault is not None else self.cache.repeat(first.answer)
            if program.answer is None:  # not plain tensors, or failed
                self.batches.run_members([(program, call)])


def _taken_together(members: Sequence[Program], wholes: Wholes) -> list[tuple[Any, ...]] | None:
    """What the members' steps gave; None if there is only one, or if they could not be taken together."""
    if len(members) == 1:
        return None
    try:
        return solvers.run([program.due.rows for program in members if program.due is not None], wholes)
    except Exception as fault:  # noqa: BLE001 - whatever torch raises: then step by step
        log.warning("steps could not be taken together: %s: %s", type(fault).__name__, fault)
        return None
