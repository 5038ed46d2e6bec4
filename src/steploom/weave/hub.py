"""The hub: resumes programs, gathers the module calls that they suspend on, runs each group once, hands out the rows.

One call of :meth:`Hub.tick` advances each program by at most one step of its own loop.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from steploom.weave.aside.aside import Aside
from steploom.weave.batching.batches import Batches, Group
from steploom.weave.batching.invariant import InvariantBatches
from steploom.weave.batching.wholes import Wholes
from steploom.weave.calls import ModuleCall
from steploom.weave.chores import Chores
from steploom.weave.counters import Counters
from steploom.weave.forwards.encode_cache import EncodeCache
from steploom.weave.noise import solvers
from steploom.weave.order import CallOrder, is_denoiser
from steploom.weave.program import Program

log = logging.getLogger(__name__)

CALLS_PER_TICK = 8
"""Calls of one module by one program in one tick; a program without steps goes on in the next tick."""

SHARE = 0.25
"""Of the time of a tick's steps, what it may spend on top of that: on encoders, VAEs, and those who start or return."""

FEW, FEW_S = 3, 0.05
"""Where so few denoise, the seconds that it may spend in any case: to share a forward soon gains more."""


class Hub:
    """Runs programs against the shared modules of one pipeline. All of it on one thread, but for what runs aside.

    Args:
        encode_cache_bytes: Bytes of text-encoder results that are kept.
        tell: Hears of probing and verification, which make a tick longer than others.
        aside: Makes what runs text encoders and VAEs beside the ticks; without it they run in the ticks.
        most: Programs that take part in a denoiser's forward, at most; those that return from aside come last.
        invariant: A request's bits do not depend on who shares its forwards: each has ``most`` requests, filled up with
            copies, and nothing else is merged.
    """

    def __init__(
        self,
        encode_cache_bytes: int,
        tell: Callable[[str], None] = lambda line: None,
        aside: Callable[[Callable[[Group], None]], Aside] = Aside,
        most: int | None = None,
        *,
        invariant: bool = False,
    ) -> None:
        self.cache = EncodeCache(encode_cache_bytes)
        self.counters = Counters()
        self._wholes = Wholes()
        self._invariant = invariant
        self.batches = (
            InvariantBatches(self.counters, tell, self._wholes, most or 1)
            if invariant
            else Batches(self.counters, tell, self._wholes)
        )
        self._news: list[str] = []
        self._tell = tell
        self.chores = Chores(self.cache, self._news.append, merging=not invariant)
        self.aside = aside(self.chores.answer)
        self._order = CallOrder()
        self._most = math.inf if most is None else most
        self._seats = self._most
        self._seated: set[Program] = set()
        self._loops: set[str] = set()
        self._chores_wait = False
        self._denoising: list[Program] = []
        self._others = 0
        self._step_s = self._left = 0.0

    def tick(self, programs: Sequence[Program], *, others: int = 0) -> None:
        """Advances each program to the end of its next step, or of its pipeline call, but for those that are aside.

        Where nothing else can go on, it waits for one of them.

        Args:
            programs: Those that take part, and all that are aside.
            others: How many there are that do not take part in this tick.
        """
        self.counters.begin_tick()
        self._wholes.begin_tick()
        self.cache.look_again()
        self._seated.clear()
        here = sum(not program.aside for program in programs)
        self._seats = math.inf if here == len(programs) else max(self._most, here)
        self._others, self._denoising = others, [p for p in programs if p.phase == "denoise"]
        with torch.no_grad():  # not inference_mode: pipelines update in place what the hub returned
            for program in programs:
                program.shared_with, program.last_module, program.step_end = [], None, None
                program.calls_made = {program.call.target.name: 1} if program.call else {}
            self._left = max(SHARE * self._step_s, FEW_S if len(self._denoising) + others <= FEW else 0.0)
            self._go_on(programs)
            if self._chores_wait and self._busy:  # whose text takes no time takes part in this tick
                self._chores_wait = False
                self._advance(programs, denoise=False)
            if self.aside.busy:
                self._give_time(programs, self._left)
            began = time.perf_counter()
            self._advance(programs, denoise=True)
            while programs and not others and self.aside.busy and all(program.aside for program in programs):
                self._give_time(programs, math.inf)
                self._advance(programs, denoise=True)
            self._witness(programs)
            # After its last step a program decodes in the same tick: it would only take a place in the next one.
            # One that cannot say which step is the last runs on to its next call, or to its end.
            finishing = [p for p in programs if p.step_end and (p.phase == "decode" or p.watcher.open_ended)]
            for program in finishing:
                program.last_module = (
                    None  # a VAE that decodes would seem to lead to the ControlNet that it encodes for
                )
                self._resume(program)
            if self._denoising:
                self._step_s = max(0.0, time.perf_counter() - began - self.counters.warmup_s)
            self._advance(finishing, denoise=False)
            if self.aside.busy:
                stepped = {program for program in programs if program.step_end is not None}
                self._give_time(programs, self._left)
                self._witness([program for program in programs if program not in stepped])

    @staticmethod
    def _witness(programs: Sequence[Program]) -> None:
        for program in programs:
            if program.step_end is not None and program.witness is not None:
                program.witness()

    @property
    def kinds(self) -> dict[str, str]:
        """Kinds of merge by name: verified, or why they are never merged."""
        return self.batches.verdicts.summary() | self.chores.batches.verdicts.summary()

    def forget(self, program: Program) -> None:
        """The program is over."""
        self.batches.forget(program)
        self._wholes.clear()  # the batch is another one now, or there is none
        self._seated.discard(program)
        self._denoising = [one for one in self._denoising if one is not program]

    def _go_on(self, programs: Sequence[Program]) -> None:
        """Resumes those that wait for nothing; beside others' steps who starts, or returns, does so in bounded time."""
        self._take_back()
        busy = self._busy
        for program in programs:
            if not (program.answered if program.aside else program.call is None):
                continue
            if program.begun and not program.aside:
                self._resume(program)
            elif self._left >= 0 or not busy:
                started = time.perf_counter()
                self._resume(program)
                self._left -= time.perf_counter() - started
            else:
                program.aside = program.answered = True

    @property
    def _busy(self) -> bool:
        """Whether anybody's steps would have to wait for what can run aside."""
        return self.aside.takes_any and (
            self._others > 0 or any(program.phase == "denoise" for program in self._denoising)
        )

    def _take_back(self) -> None:
        """Takes note of what was done aside."""
        self.aside.take()
        while self._news:
            self._tell(self._news.pop(0))
        self.absorb()

    def absorb(self) -> None:
        """Counts what was counted aside, unless something is under way: then later."""
        if not self.aside.working:
            self.counters.absorb(self.chores.counters)

    def _give_time(self, programs: Sequence[Program], seconds: float) -> None:
        """Waits so long for what is aside, or runs it; who returns goes on to its next module call."""
        began = time.perf_counter()
        until = began + seconds
        while self.aside.busy:
            started = time.perf_counter()
            done = started < until and self.aside.spend(until - started)
            self.counters.chore(time.perf_counter() - started)
            if not done:
                break
            self._take_back()
            back = [program for program in programs if program.answered]
            for program in back:
                if time.perf_counter() < until:
                    self._resume(program)
            self._advance(back, denoise=False)
            if seconds == math.inf:
                break
        self._left -= time.perf_counter() - began

    def _advance(self, programs: Sequence[Program], *, denoise: bool) -> None:
        """Runs what the programs wait for until none waits for anything that may run in this tick."""
        while group := self._next_group(programs, denoise):
            self._run(group)
            for program, _ in group:
                if not program.aside:
                    self._resume(program)
        self._take_steps([program for program in programs if program.due is not None])

    def _take_steps(self, programs: Sequence[Program]) -> None:
        """Takes the steps that are due: those of one kind of noise scheduler as one update of all rows."""
        alike: dict[Hashable, list[Program]] = {}
        for program in programs:
            assert program.due is not None
            alike.setdefault(program.due.rows.key, []).append(program)
        for members in alike.values():
            answers = None if self._invariant else _taken_together(members, self._wholes)
            for program, answer in zip(members, answers or [None] * len(members), strict=True):
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
            if not is_denoiser(name):
                self._chores_wait = True
                return
            if program.steps == program.holdings.step:  # its first one, or another call of it was of a new form
                program.holdings.add(call.leaves, program.steps)
            if program.phase == "encode":
                program.enter("denoise")

    def _next_group(self, programs: Sequence[Program], denoise: bool) -> Group:
        """The pending calls of one module that no other scheduled program can still join in this tick."""
        pending = [
            (p, p.call)
            for p in programs
            if p.call and not p.aside and p.calls_made[p.call.target.name] <= CALLS_PER_TICK
        ]
        pending = [(p, call) for p, call in pending if not is_denoiser(call.target.name) or (denoise and self._seat(p))]
        if not pending:
            return []
        name = self._order.first({call.target.name for _, call in pending})
        return [(program, call) for program, call in pending if call.target.name == name]

    def _seat(self, program: Program) -> bool:
        """Whether the program has a place in the denoisers' forwards of this tick; all have where nobody returns."""
        if self._seats == math.inf:
            return True
        if len(self._seated) < self._seats:
            self._seated.add(program)
        return program in self._seated

    def _run(self, group: Group) -> None:
        """Answers every call of the group, or sends it aside."""
        if is_denoiser(group[0][1].target.name):
            if not self.batches.run_again(group):
                self.batches.run(group)
            return
        at_once = group if not (self._busy or self.aside.busy) else [e for e in group if not self._leaves(*e)]
        if len(at_once) < len(group):
            self.aside.send([entry for entry in group if entry not in at_once])
        if at_once:
            self._run_at_once(at_once)

    def _leaves(self, program: Program, call: ModuleCall) -> bool:
        """Whether a call runs aside: not if its module has to stay, nor if a pipeline makes it at every step."""
        if program.phase != "denoise":
            return self.aside.takes(call)
        name = call.target.name
        if program.watcher.open_ended or program.asked.setdefault(name, program.steps) != program.steps:
            self._loops.add(name)
        return name not in self._loops and self.aside.takes(call)

    def _run_at_once(self, group: Group) -> None:
        self.aside.settle()
        self.absorb()
        with self.aside.timed(group[0][1]):
            self.chores.answer(group)
        self.counters.chore(self.chores.counters.forward_s)
        self.counters.warmup_s += self.chores.counters.warmup_s
        self._take_back()


def _taken_together(members: Sequence[Program], wholes: Wholes) -> list[tuple[Any, ...]] | None:
    """What the members' steps gave; None if there is only one, or if they could not be taken together."""
    if len(members) == 1:
        return None
    try:
        return solvers.run([program.due.rows for program in members if program.due is not None], wholes)
    except Exception as fault:  # noqa: BLE001 - whatever torch raises: then step by step
        log.warning("steps could not be taken together: %s: %s", type(fault).__name__, fault)
        return None
