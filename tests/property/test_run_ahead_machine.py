"""Two ticks in flight: amendments in time and too late, late answers, aborts between, ends that were not foreseen."""

from __future__ import annotations

import pytest
from ahead_world import AheadWorld, Course
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from machine import often


class RunAheadMachine(RuleBasedStateMachine):
    """Drives an :class:`AheadWorld`; all checks are the world's."""

    world: AheadWorld

    @initialize(
        scheduler=st.sampled_from(["step", "step", "step", "request"]),
        max_batch=st.integers(1, 4),
        spare=st.integers(0, 3),
        policy=st.sampled_from(["fcfs", "deadline", "srpt"]),
    )
    def start(self, scheduler: str, max_batch: int, spare: int, policy: str) -> None:
        self.world = AheadWorld(scheduler, max_batch, spare, policy)

    @rule(
        encode=st.sampled_from([0, 0, 0, 1, 2]),
        steps=st.integers(1, 5),
        tail=st.sampled_from([0, 0, 0, 1, 3]),
        tells=st.booleans(),
        shape=st.integers(0, 2),
        aside=st.booleans(),
        at_once=st.booleans(),
    )
    def submit(self, encode: int, steps: int, tail: int, tells: bool, shape: int, aside: bool, at_once: bool) -> None:
        self.world.submit(Course(encode, steps, tail, tells, shape, aside))
        if at_once:
            self.world.amend()

    @precondition(lambda self: self.world.alive)
    @rule(index=st.integers(0, 20))
    def abort(self, index: int) -> None:
        alive = self.world.alive
        self.world.abort(alive[index % len(alive)])
        self.world.amend()

    @precondition(lambda self: self.world.can_send)
    @rule()
    def send(self) -> None:
        self.world.send()

    @precondition(lambda self: len(self.world.flights) == 2)
    @rule()
    def amend(self) -> None:
        self.world.amend()

    @precondition(lambda self: self.world.wire)
    @rule()
    def deliver(self) -> None:
        self.world.deliver()

    @precondition(lambda self: not self.world.inbox.empty)
    @rule()
    def work(self) -> None:
        self.world.work()

    @precondition(lambda self: self.world.answers)
    @rule()
    def answer(self) -> None:
        self.world.answer()

    @rule(times=st.integers(1, 4))
    def turns(self, times: int) -> None:
        for _ in range(times):
            self.world.turn()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.drain()


def test_who_came_too_late_to_end_does_not_stand_before_the_one_that_took_its_place() -> None:
    """The worker has a place for one, and holds a request of two steps; another one, let in before it, waits."""
    world = AheadWorld("step", 1, 0)
    for _ in range(2):
        world.submit(Course(0, 1, 0))
        world.send()
        world.deliver()
    world.work()
    world.work()
    world.abort("r1")
    world.submit(Course(0, 1, 0))
    world.amend()
    world.submit(Course(0, 2, 1))
    world.answer()
    world.drain()
    assert world.outcomes == {"r0": "finished", "r1": "aborted", "r2": "finished", "r3": "finished"}


def test_who_decodes_beside_the_ticks_leaves_its_place_in_the_batch_to_another() -> None:
    world = AheadWorld("step", 1, 2)
    world.submit(Course(0, 2, 9, aside=True))
    world.submit(Course(2, 3, 0, aside=True))
    for _ in range(9):
        world.turn()
    assert world.outcomes == {"r1": "finished"}, "it steps while the first one decodes"
    world.drain()
    assert world.outcomes == {"r0": "finished", "r1": "finished"}


def test_who_is_aside_goes_on_in_no_tick_whose_answer_nobody_waits_for() -> None:
    """An amendment comes too late, and its request is aborted: the worker is only told to forget it."""
    world = AheadWorld("step", 2, 0)
    world.submit(Course(0, 2, 1, aside=True))
    for _ in range(2):
        world.send()
        world.deliver()
    world.work()
    world.submit(Course(0, 1, 0))
    world.amend()
    world.work()
    world.abort("r1")
    world.amend()
    world.drain()
    assert world.outcomes == {"r0": "finished", "r1": "aborted"}


TestRunAheadMachine = pytest.mark.timeout(400)(RunAheadMachine.TestCase)  # Shrinking a failure takes minutes.
TestRunAheadMachine.settings = often(80, stateful_step_count=50)
