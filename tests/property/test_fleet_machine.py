"""Fleets against a model: arrivals, classes, aborts, workers that die (of requests, by chance), return, leave."""

from __future__ import annotations

import pytest
from fleet_world import Asked, FleetWorld
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule


class FleetMachine(RuleBasedStateMachine):
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
    )
    def start(self, workers: int, max_batch: int, spare: int, policy: str, max_retries: int, chance: bool) -> None:
        self.world = FleetWorld(workers, max_batch, spare, policy, max_retries)
        self.chance = chance

    @rule(
        names=st.lists(st.integers(0, 40), min_size=1, max_size=8, unique=True),
        priority=st.sampled_from([0, 0, -1, 2]),
        steps=st.integers(1, 5),
        kills=st.sampled_from([*[None] * 6, 0, 2]),
    )
    def submit(self, names: list[int], priority: int, steps: int, kills: int | None) -> None:
        for offset, name in enumerate(names):
            deadly = kills if not offset and kills is not None and kills < steps else None
            self.world.submit(f"r{name}", Asked(priority, steps, deadly))

    @rule(name=st.integers(0, 40))
    def abort(self, name: int) -> None:
        self.world.abort(f"r{name}")

    @rule(choice=st.integers(0, 2), times=st.integers(1, 4))
    def turns(self, choice: int, times: int) -> None:
        """Ticks of one worker, with one more in flight if there was one."""
        worker = self.world.workers[choice % len(self.world.workers)]
        for _ in range(times):
            if worker.member.up and worker.member.has_work and len(worker.sent) < 2:
                self.world.schedule(worker)
            if worker.sent:
                self.world.execute(worker)

    @rule(choice=st.integers(0, 2))
    def ahead(self, choice: int) -> None:
        worker = self.world.workers[choice % len(self.world.workers)]
        if worker.member.up and worker.member.has_work and len(worker.sent) < 2:
            self.world.schedule(worker)

    @precondition(lambda self: self.chance)
    @rule(choice=st.integers(0, 2))
    def die(self, choice: int) -> None:
        worker = self.world.workers[choice % len(self.world.workers)]
        if worker.member.up:
            self.world.by_chance = True
            self.world.die(worker)

    @rule(choice=st.integers(0, 2), hopeless=st.booleans())
    def comes_back(self, choice: int, hopeless: bool) -> None:
        worker = self.world.workers[choice % len(self.world.workers)]
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
        while self.world.workers[-1].sent:
            self.world.execute(self.world.workers[-1])
        self.world.leave(at_once)

    @rule(seconds=st.integers(1, 8))
    def wait(self, seconds: int) -> None:
        self.world.now += seconds

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.drain()


TestFleetMachine = pytest.mark.timeout(400)(FleetMachine.TestCase)  # Seconds; shrinking a failure takes minutes.
TestFleetMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
