"""What state machines share that drive a world with a clock: its checks after every rule, and its drain at the end."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule


def often(examples: int, **others: Any) -> settings:
    """Settings for so many examples, and for as many times more as the profile asks for more than 100."""
    return settings(max_examples=examples * settings().max_examples // 100, **others)


class Machine(RuleBasedStateMachine):
    """Drives ``world``, which an initialize rule makes; all checks are the world's."""

    world: Any

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
