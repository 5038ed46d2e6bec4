"""Fleets against a model: arrivals, classes, aborts, workers that die (of requests, by chance), return, leave."""

from __future__ import annotations

import pytest
from fleet_world import Asked, FleetWorld, Worker
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule
from machine import Machine, often


class FleetMachine(Machine):
    """Drives a :class:`FleetWorld`; all checks are the world's."""

    world: FleetWorld
    chance: bool

    @initialize(
        workers=st.integers(1, 3),
        max_batch=st.integers(1, 3),
        spare=st.integers(0, 3),
        policy=st.sampled_from(["fcfs", "deadline", "srpt"]),
        max_retries=st.integers(1, 2),
        chance=st.booleans(),
        scheduler=st.sampled_from(["step", "step", "step", "request"]),
    )
    def start(
        self, workers: int, max_batch: int, spare: int, policy: str, max_retries: int, chance: bool, scheduler: str
    ) -> None:
        self.world = FleetWorld(workers, max_batch, spare, policy, max_retries, scheduler)
        self.chance = chance

    @rule(
        times=st.integers(1, 8),
        priority=st.sampled_from([0, 0, -1, 2]),
        encode=st.sampled_from([0, 0, 0, 1, 2]),
        steps=st.integers(1, 5),
        tail=st.sampled_from([0, 0, 0, 1, 3]),
        tells=st.booleans(),
        shape=st.sampled_from([0, 0, 0, 1, 2]),
        aside=st.booleans(),
        kills=st.sampled_from([*[None] * 6, 0, 2]),
        at_once=st.booleans(),
    )
    def submit(
        self,
        times: int,
        priority: int,
        encode: int,
        steps: int,
        tail: int,
        tells: bool,
        shape: int,
        aside: bool,
        kills: int | None,
        at_once: bool,
    ) -> None:
        """The first one may kill."""
        for number in range(times):
            asked = Asked(encode, steps, tail, tells, shape, aside, priority)
            asked.kills = kills if not number and kills is not None and kills < asked.ticks else None
            self.world.submit(asked)
            if at_once:
                self.world.amend()

    @precondition(lambda self: self.world.live)
    @rule(index=st.integers(0, 40))
    def abort(self, index: int) -> None:
        names = list(self.world.live)
        self.world.abort(names[index % len(names)])
        self.world.amend()

    def _worker(self, choice: int) -> Worker:
        return self.world.workers[choice % len(self.world.workers)]

    @rule(choice=st.integers(0, 2), times=st.integers(1, 4), late=st.booleans())
    def turns(self, choice: int, times: int, late: bool) -> None:
        """Ticks of one worker, with one more in flight if there was one."""
        worker = self._worker(choice)
        for _ in range(times):
            if self.world.can_send(worker):
                self.world.send(worker)
            self.world.work(worker, late)

    @rule(choice=st.integers(0, 2))
    def ahead(self, choice: int) -> None:
        worker = self._worker(choice)
        if self.world.can_send(worker):
            self.world.send(worker)

    @rule()
    def amend(self) -> None:
        self.world.amend()

    @precondition(lambda self: self.chance)
    @rule(choice=st.integers(0, 2))
    def die(self, choice: int) -> None:
        worker = self._worker(choice)
        if worker.member.up:
            self.world.die(worker, by_chance=True)

    @rule(choice=st.integers(0, 2), hopeless=st.booleans())
    def comes_back(self, choice: int, hopeless: bool) -> None:
        worker = self._worker(choice)
        if not worker.member.up:
            if hopeless:
                worker.member.give_up()
            else:
                worker.member.revive()

    @precondition(lambda self: len(self.world.workers) < 3)
    @rule()
    def add_worker(self) -> None:
        self.world.add_worker()

    @precondition(lambda self: len(self.world.workers) > 1)
    @rule(at_once=st.booleans())
    def leave(self, at_once: bool) -> None:
        self.world.leave(at_once)


TestFleetMachine = pytest.mark.timeout(400)(FleetMachine.TestCase)  # Seconds; shrinking a failure takes minutes.
TestFleetMachine.settings = often(100, stateful_step_count=40)
