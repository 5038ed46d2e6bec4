"""Where a worker's time goes: seconds by part of the tick, for ``steploom bench tick``.

Functions of the tick are wrapped while the profile runs and are as before afterwards; so it costs nothing else. Time is
counted for the innermost wrapped function that runs; what runs aside is not. A program's own code is what a resume
takes beyond that.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import greenlet

from steploom.weave import copies, hub, program
from steploom.weave.aside.aside import is_aside
from steploom.weave.batching import batches, merging, plans
from steploom.weave.modules import shared
from steploom.weave.noise import observed, solvers
from steploom.worker import process, residents, runner

PARTS = {
    "forward": [(shared.Target, "invoke")],
    "merge and split": [(merging.MergedCall, "run"), (merging.MergedCall, "refill"), (merging.MergedCall, "__init__")],
    "signature": [
        (copies, "formed_call"), (plans.Plans, "find"), (batches.Batches, "run"), (batches.Batches, "run_again"),
    ],
    "noise scheduler": [
        (hub, "_taken_together"), (observed, "row_step"), (observed.StepDue, "taken"), (observed.StepDue, "take_alone"),
        (solvers, "run"),
    ],
    "pipeline": [(program.Program, "resume")],
    "set-up and tear-down": [(runner.Runner, "_start"), (runner.Runner, "_forget")],
    "report": [(residents.Resident, "report"), (runner, "show")],
    "hub": [(runner.Runner, "execute")],
    "protocol": [(process.codec, "encode"), (process.codec, "decode")],
}  # fmt: skip
"""The functions whose own time each part is."""

SWITCHING, IDLE = "switching", "idle"
SLICES_KEPT = 200_000
"""Of the trace."""


@dataclasses.dataclass
class Measured:
    """What a profile found.

    Attributes:
        seconds: By part; ``switching`` is estimated from the number of switches.
        ticks: How many.
        rows: Scheduled requests, summed over ticks.
        slices: Part, start and length in seconds, for a trace; the first ones.
    """

    seconds: dict[str, float]
    ticks: int
    rows: int
    slices: list[tuple[str, float, float]]


class TickProfile:
    """A worker extension that measures the worker it lives in."""

    runner: Any

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._slices: list[tuple[str, float, float]] = []
        self._stack: list[str] = []
        self._since = 0.0
        self._undo: list[Callable[[], None]] = []
        self._ticks = self._rows = self._switches = 0

    def start_profile(self) -> None:
        """Begins anew."""
        self.stop_profile()
        self._seconds = dict.fromkeys([*PARTS, SWITCHING, IDLE], 0.0)
        self._ticks = self._rows = self._switches = 0
        self._slices, self._stack, self._since = [], [IDLE], time.perf_counter()
        for part, places in PARTS.items():
            for owner, name in places:
                self._wrap(owner, name, part)

    def stop_profile(self) -> dict[str, Any]:
        """Ends it; what was :class:`Measured`, as a dictionary."""
        while self._undo:
            self._undo.pop()()
        seconds = dict(self._seconds)
        if seconds:
            switching = min(self._switches * _switch_s(), seconds["pipeline"])
            seconds[SWITCHING] += switching
            seconds["pipeline"] -= switching
        return dataclasses.asdict(Measured(seconds, self._ticks, self._rows, self._slices))

    def _wrap(self, owner: Any, name: str, part: str) -> None:
        original: Any = getattr(owner, name)

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if is_aside():
                return original(*args, **kwargs)
            self._turn(part)
            try:
                return original(*args, **kwargs)
            finally:
                self._return()

        counted = timed
        if name == "execute":
            counted = self._counting(timed)
        elif name == "resume":
            counted = self._counting_switches(timed)
        setattr(owner, name, counted)
        self._undo.append(lambda: setattr(owner, name, original))

    def _counting(self, timed: Any) -> Any:
        def execute(runner: Any, output: Any) -> Any:
            self._ticks += 1
            self._rows += len(output.scheduled_cached_reqs) + len(output.scheduled_new_reqs)
            return timed(runner, output)

        return execute

    def _counting_switches(self, timed: Any) -> Any:
        def resume(*args: Any, **kwargs: Any) -> Any:
            self._switches += 2  # there and back
            return timed(*args, **kwargs)

        return resume

    def _turn(self, part: str) -> None:
        self._pass()
        self._stack.append(part)

    def _return(self) -> None:
        self._pass()
        self._stack.pop()

    def _pass(self) -> None:
        now = time.perf_counter()
        part, began = self._stack[-1], self._since
        self._seconds[part] += now - began
        if len(self._slices) < SLICES_KEPT:
            self._slices.append((part, began, now - began))
        self._since = now


def _switch_s(turns: int = 2000) -> float:
    """Seconds of one switch between greenlets, here and now."""

    def there() -> None:
        parent: Any = greenlet.getcurrent().parent
        while True:
            parent.switch()

    other = greenlet.greenlet(there)
    began = time.perf_counter()
    for _ in range(turns):
        other.switch()
    found = (time.perf_counter() - began) / (2 * turns)
    other.throw(greenlet.GreenletExit)
    return found
