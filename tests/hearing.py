"""Hearing of a noise scheduler's steps, outside of a program."""

from __future__ import annotations

from typing import Any

from steploom.weave.noise.observed import StepDue, StepEnd


class Heard(list[StepEnd]):
    """The ends of steps, as they came; never pauses anybody."""

    def ended(self, noise_scheduler: Any, end: StepEnd) -> None:
        self.append(end)

    def part_ended(self, end: StepEnd, result: object) -> None:
        """Copies' steps are none of these."""

    def may_pause(self) -> bool:
        return False

    def pause(self, stop: StepEnd | StepDue) -> Any:
        raise AssertionError("nobody can pause here")
