"""The schedulers against a model: arrivals, keys, priorities, failures, aborts, dead workers, two ticks in flight."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule
from machine import Machine, often
from programs import Program, true_key
from scheduler_world import SHAPES
from weighed_world import WeighedWorld


class SchedulerMachine(Machine):
    """Drives a :class:`WeighedWorld`; all checks are the world's."""

    world: WeighedWorld

    @initialize(
        scheduler=st.sampled_from(["step", "step", "step", "request"]),
        max_batch=st.integers(1, 4),
        spare=st.integers(0, 4),
        stable=st.booleans(),
        policy=st.sampled_from(["fcfs", "deadline", "srpt"]),
        preempt=st.booleans(),
        room=st.sampled_from([0, 0, 1, 4, 9]),
    )
    def start(self, room: int, **settings: Any) -> None:
        self.world = WeighedWorld(**settings)
        self.world.room = room

    @rule(
        names=st.lists(st.integers(0, 30), min_size=1, max_size=6),
        shape=st.integers(0, SHAPES - 1),
        priority=st.sampled_from([0, 0, 0, -1, 2]),
        encode=st.integers(0, 2),
        keys=st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=6),
        fails=st.booleans(),
        kills=st.sampled_from([*[None] * 8, 0, 1, 3]),
    )
    def submit(
        self, names: list[int], shape: int, priority: int, encode: int, keys: list[str], fails: bool, kills: int | None
    ) -> None:
        for offset, name in enumerate(names):
            erratic = keys[offset % len(keys) :] + keys[: offset % len(keys)]
            course = [true_key(shape) for _ in keys] if self.world.stable else erratic
            whole = [*([None] * encode), *course]
            deadly = kills if offset == 0 and kills is not None and kills < len(whole) else None  # One of them at most.
            self.world.submit(f"r{name}", Program(shape, priority, whole, fails, deadly))

    @rule(choice=st.lists(st.integers(0, 30), max_size=3))
    def abort(self, choice: list[int]) -> None:
        names = [*self.world.live, "unknown"]
        self.world.abort([names[index % len(names)] for index in choice])

    @precondition(lambda self: len(self.world.flights) < 2)
    @rule()
    def schedule(self) -> None:
        self.world.schedule()

    @precondition(lambda self: any(flight.result is None for flight in self.world.flights))
    @rule()
    def execute(self) -> None:
        self.world.execute()

    @precondition(lambda self: self.world.flights and self.world.flights[0].result is not None)
    @rule()
    def answer(self) -> None:
        self.world.answer()

    @precondition(lambda self: len(self.world.flights) < 2)
    @rule(times=st.integers(1, 5))
    def turns(self, times: int) -> None:
        """Whole ticks, with one more in flight if there was one."""
        for _ in range(times):
            self.world.schedule()
            self.world.execute()
            if self.world.flights:
                self.world.answer()

    @precondition(lambda self: self.world.held)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        self.world.lose(data.draw(st.lists(st.sampled_from(sorted(self.world.held)), max_size=2)))

    @rule(by_name=st.booleans(), luck=st.integers(0, 3))
    def die(self, by_name: bool, luck: int) -> None:
        if luck == 0:
            self.world.die(by_name)

    @precondition(lambda self: self.world.stale)
    @rule()
    def answer_stale(self) -> None:
        self.world.answer_stale()


TestSchedulerMachine = pytest.mark.timeout(400)(
    SchedulerMachine.TestCase
)  # Seconds; shrinking a failure takes minutes.
TestSchedulerMachine.settings = often(100, stateful_step_count=50)
