"""Which requests arrive when: the workloads of the design, at any load, from any seed."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path

from simulation.costs import CostTable
from steploom.cli.benches import workloads
from steploom.cli.benches.workloads import Arrival

WORKLOADS = ("W1", "W2", "W3", "W4")
TRACE_SIZES = (512, 1024)
"""W3's sizes, half and half: the trace has none."""
BURST = 24
"""W4's requests."""


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A workload and what it runs on.

    Attributes:
        workload: ``"W1"`` to ``"W4"``.
        costs: Seconds of a tick.
        sizes: Pixels of its classes; None takes the workload's own.
        requests: Requests that count (of W4 always a burst of 24).
        warm_up: Requests before these that do not; of W4 as many bursts as hold that many.
        trace: W3's file.
    """

    workload: str
    costs: CostTable
    sizes: tuple[int, ...] | None = None
    requests: int = 10_000
    warm_up: int = 200
    trace: Path | None = None

    @property
    def bursts(self) -> bool:
        """Whether it has no load: one burst, all at once."""
        return self.workload == "W4"

    @property
    def uncounted(self) -> int:
        """How many of the first arrivals do not count."""
        return math.ceil(self.warm_up / BURST) * BURST if self.bursts else self.warm_up

    def arrivals(self, load: float, seed: int) -> list[Arrival]:
        """The requests, those of the warm-up first.

        Args:
            load: Seconds of standalone work that arrive in a second: 1 is what one request at a time can just do.
            seed: Of times and sizes. Another load only stretches the times.
        """
        requests = self._at_rate_1(seed)
        if self.bursts:
            return requests
        stretch = self.standalone_s(seed) / load
        return [dataclasses.replace(arrival, at_s=arrival.at_s * stretch) for arrival in requests]

    def rate(self, load: float, seed: int) -> float:
        """Requests a second."""
        return load / self.standalone_s(seed)

    def standalone_s(self, seed: int) -> float:
        """Mean standalone seconds of its requests: one by this is what one at a time can do."""
        return _mean_standalone_s(self, seed)

    def _at_rate_1(self, seed: int) -> list[Arrival]:
        return _at_rate_1(self, seed)


@functools.lru_cache(maxsize=64)
def _mean_standalone_s(scenario: Scenario, seed: int) -> float:
    requests = _at_rate_1(scenario, seed)
    return sum(map(scenario.costs.standalone_s, requests)) / len(requests)


@functools.lru_cache(maxsize=64)
def _at_rate_1(scenario: Scenario, seed: int) -> list[Arrival]:
    many, name = scenario.uncounted + scenario.requests, scenario.workload
    if name in ("W1", "W2"):
        make = workloads.w1 if name == "W1" else workloads.w2
        return make(many, 1.0, seed, scenario.sizes or workloads.SIZES)
    if name == "W3":
        if scenario.trace is None:
            raise ValueError("W3 replays a trace: give its file by --trace")
        return workloads.w3(scenario.trace, many, seed, 1.0, scenario.sizes or TRACE_SIZES)
    if name == "W4":
        return _bursts(scenario, (scenario.sizes or (512,))[0])
    raise ValueError(f"workload {name!r}: there is none; give one of {', '.join(WORKLOADS)}")


def _bursts(scenario: Scenario, size: int) -> list[Arrival]:
    """Bursts so far apart that each has ended before the next: those of the warm-up, then the one that counts."""
    burst: Sequence[Arrival] = workloads.w4(BURST, size)
    apart_s = 1.5 * sum(map(scenario.costs.standalone_s, burst))
    times = [i * apart_s for i in range(scenario.uncounted // BURST + 1)]
    return [dataclasses.replace(arrival, at_s=at) for at in times for arrival in burst]
