"""Policies side by side: one scenario, several policies, loads and seeds."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from simulation.engine import Run, Simulation
from simulation.figures import SLO, Figures, figures, mean, medians
from simulation.goodput import highest_load
from simulation.scenario import Scenario
from steploom.config import EngineConfig
from steploom.sched import POLICIES

LOCK = "lock"
"""One request at a time, first come first served: what an application behind a lock does."""


def silent(text: str) -> None:
    """Tells nobody."""


@dataclasses.dataclass(frozen=True)
class Row:
    """What one policy made of one scenario at one load: medians over seeds.

    ``runs`` are those of the seeds, for pictures.
    """

    scenario: Scenario
    load: float
    rate: float
    policy: str
    figures: Figures
    runs: list[Run] = dataclasses.field(repr=False)

    def as_json(self) -> dict[str, Any]:
        """Without the runs."""
        load = {} if self.scenario.bursts else {"load": self.load, "rate_per_s": self.rate}
        return {"workload": self.scenario.workload, **load, "policy": self.policy, **self.figures.as_json()}


@dataclasses.dataclass(frozen=True)
class Study:
    """How scenarios are run.

    Attributes:
        seeds: How many, from 0.
        slo: Times its standalone time within which a request without a deadline should finish.
        timeout: Seconds after which any request is given up; None is never.
        settings: Further fields of ``EngineConfig``.
        tell: Is told of each run.
        jobs: Processes.
    """

    seeds: int = 1
    slo: float = SLO
    timeout: float | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    tell: Callable[[str], None] = silent
    jobs: int = 1

    def rows(self, scenario: Scenario, policies: Sequence[str], loads: Sequence[float]) -> list[Row]:
        """Each policy at each load, load by load."""
        cases = [(policy, load) for load in loads for policy in policies]
        return self._each(self.row, [(scenario, policy, load) for policy, load in cases])

    def goodputs(self, scenario: Scenario, policies: Sequence[str], target: float) -> list[tuple[float, float]]:
        """:meth:`goodput` of each policy, of the first seed."""
        one = dataclasses.replace(self, seeds=1)
        return self._each(one.goodput, [(scenario, policy, target) for policy in policies])

    def _each(self, call: Callable[..., Any], cases: Sequence[tuple[Any, ...]]) -> list[Any]:
        """In processes if there are to be several; the order is that of the cases."""
        if self.jobs == 1 or len(cases) == 1:
            return [call(*case) for case in cases]
        with ProcessPoolExecutor(self.jobs) as pool:
            return list(pool.map(call, *zip(*cases, strict=True)))

    def row(self, scenario: Scenario, policy: str, load: float) -> Row:
        """One policy at one load."""
        runs = [self.run(scenario, policy, load, seed) for seed in range(self.seeds)]
        rates = [scenario.rate(load, seed) for seed in range(self.seeds)]
        seen = medians([figures(run, self.slo) for run in runs])
        return Row(scenario, load, mean(rates), policy, seen, runs)

    def run(self, scenario: Scenario, policy: str, load: float, seed: int) -> Run:
        """One simulation."""
        started = time.perf_counter()
        config = config_of(policy, self.settings)
        arrivals = scenario.arrivals(load, seed)
        simulation = Simulation(arrivals, scenario.costs, config, warm_up=scenario.uncounted, timeout=self.timeout)
        run = simulation.run()
        at = "" if scenario.bursts else f" load {load:.3g}"
        self.tell(f"{scenario.workload}{at} {policy} seed {seed}: {time.perf_counter() - started:.1f} s")
        return run

    def goodput(self, scenario: Scenario, policy: str, target: float) -> tuple[float, float]:
        """The highest load, and rate in requests a second, at which attainment, the mean over seeds, is ``target``."""

        def attained(load: float) -> float:
            runs = (self.run(scenario, policy, load, seed) for seed in range(self.seeds))
            return mean([figures(run, self.slo).attained for run in runs])

        load = highest_load(attained, target)
        return load, mean([scenario.rate(load, seed) for seed in range(self.seeds)])


def config_of(policy: str, settings: Mapping[str, Any]) -> EngineConfig:
    """The engine's settings for a policy by name, by ``pkg.module.Class``, or :data:`LOCK`."""
    if policy == LOCK:
        return EngineConfig(**{**settings, "scheduler": "request", "policy": "fcfs"})
    return EngineConfig(**{**settings, "policy": policy})


def known_policies() -> list[str]:
    """All that are compared by default, the simplest first."""
    order = (LOCK, "fcfs", "srpt", "deadline")
    return sorted([LOCK, *POLICIES], key=lambda name: order.index(name) if name in order else len(order))
