"""What a program's own pipeline reports while it runs: its steps, how many there will be, and its text."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from steploom.weave.calls import ModuleCall
from steploom.weave.laid_out import Bounds
from steploom.weave.noise import observed
from steploom.weave.noise.observed import StepDue, StepEnd
from steploom.weave.program import may_suspend, suspend
from steploom.weave.text import TextWatch, watch_for
from steploom.weave.transcript import Transcript

log = logging.getLogger(__name__)


class Watcher:
    """What a program's pipeline reports: ends of steps and announced totals, and its text if it is a language model's.

    Args:
        bounds: Is told what it is about to make as soon as it says so, and may raise.
        no_steps: Is raised if the pipeline is about to take none; None lets it.

    Attributes:
        total_steps: Steps in all, if known; a language model never knows.
        stage: Of a cascade, or the block of a language model.
        steps: Steps done.
        transcript: The text; None for other models.
        parts: What copies of its noise schedulers gave (LTX-2 has one for the sound), for whoever empties it; None if
            nobody does.
    """

    def __init__(self, bounds: Bounds | None = None, no_steps: Exception | None = None) -> None:
        self.bounds = bounds
        self._no_steps = no_steps
        self.total_steps: int | None = None
        self.transcript: Transcript | None = None
        self.parts: list[Any] | None = None
        self._text: TextWatch | None = None
        self.stage = "denoise"
        self.steps = 0
        self._settled = False
        self._observed: list[Any] = []
        self._begun: dict[int, int] = {}
        self._part: StepEnd | None = None
        self._steps_itself = False

    def observe(self, noise_scheduler: Any, stage: str) -> Any:
        """An observed copy of ``noise_scheduler``."""
        own = observed.observe(noise_scheduler, _Stage(self, stage))
        self._observed.append(own)
        return own

    def step_ended(self, stage: str, noise_scheduler: Any, end: StepEnd) -> None:
        """A step of one of its noise schedulers was taken."""
        self._steps_itself, self._part = True, None
        self._count(stage, noise_scheduler, end)

    def _count(self, stage: str, noise_scheduler: Any, end: StepEnd) -> None:
        self.stage = stage
        self.steps += 1
        if self._text is not None:
            self._follow(self._text.stepped, end)
            self.stage = self._text.stage
        elif not self._settled:
            self.total_steps, self._settled = observed.total_steps(noise_scheduler, self.total_steps), True
        if self.total_steps is not None:
            self.total_steps = max(self.total_steps, self.steps)

    def part_ended(self, end: StepEnd, result: Any) -> None:
        """A step was taken by a copy of one of its noise schedulers, and returned ``result``."""
        if self.parts is not None:
            self.parts.append(result)
        if not self._steps_itself:
            self._part = end

    def turned(self) -> None:
        """The progress bar has moved: where nothing but copies has stepped since it did, they are a step together."""
        end, self._part = self._part, None
        if end is not None:
            self._settled = self._settled or self.total_steps is not None  # the bar counts what they do
            self._count(self.stage, None, end)
            if may_suspend():
                suspend(end)

    def announce(self, total: int | None, *, exact: bool, by: int = 0) -> None:
        """A progress bar was opened over ``total`` further steps.

        Args:
            total: As the pipeline says.
            exact: Whether each turn of the bar is a step.
            by: Which pipeline does, of those within a cascade.
        """
        if total == self.steps == 0 and self._no_steps is not None:
            raise self._no_steps
        if total is not None and self._text is None and self.bounds is not None:
            before = self.steps - self._begun.setdefault(by, self.steps)
            self.bounds.counted(total, before, self._observed)
        self._steps_itself, self._part = False, None
        if total is not None and self._text is None:
            self.total_steps, self._settled = self.steps + total, exact or self.steps > 0

    def follow_text(self, pipeline: Any, arguments: Mapping[str, Any]) -> None:
        """Follows the text of ``pipeline``, which is called with ``arguments``, if it is a language model's."""
        watch = watch_for(pipeline)
        if watch is not None:
            self._text = watch(arguments)
            self.transcript = Transcript(self._text, pipeline)

    @property
    def open_ended(self) -> bool:
        """Whether nobody knows which step is the last, as with language models."""
        return self._text is not None

    def called(self, call: ModuleCall) -> None:
        """The program waits for ``call``."""
        if self._text is not None:
            self._follow(self._text.called, call)

    def finished(self, output: Any) -> None:
        """The program is done."""
        if self._text is not None:
            self._follow(self._text.finished, output)

    def _follow(self, hear: Callable[[Any], None], news: Any) -> None:
        try:
            hear(news)
        except Exception as fault:  # noqa: BLE001 - a pipeline that does otherwise than it did: its output is all the same
            log.warning("the text cannot be followed any more: %s: %s", type(fault).__name__, fault)
            self.transcript = None

    def close(self) -> None:
        """Ends all observation."""
        while self._observed:
            observed.forget(self._observed.pop())


class _Stage:
    """Hears of the steps of one noise scheduler of a program."""

    def __init__(self, watcher: Watcher, name: str) -> None:
        self._watcher = watcher
        self._name = name

    def ended(self, noise_scheduler: Any, end: StepEnd) -> None:
        self._watcher.step_ended(self._name, noise_scheduler, end)

    def part_ended(self, end: StepEnd, result: Any) -> None:
        self._watcher.part_ended(end, result)

    def may_pause(self) -> bool:
        return may_suspend()

    def pause(self, stop: StepEnd | StepDue) -> Any:
        return suspend(stop)
