"""Measures one case: ``python -m conformance.measure NAME...`` (in ``tests/``) prints what the suite would assert."""

from __future__ import annotations

import dataclasses
import sys
import time
from typing import Any

import torch
from conformance.case import CASES, Case

from steploom.worker.trials import trial

CARES = 20.0
"""Swapping an argument must move the output by this many tolerances, else equality would mean nothing."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """A case's verdict, and how far its output moves when one argument takes another request's value."""

    verdict: trial.Verdict
    swaps: dict[str, float]

    def careless(self, case: Case) -> dict[str, float]:
        """The swaps that moved too little, those excused by the case left out."""
        least = max(CARES * case.tolerance, 2 * self.verdict.tolerance)
        return {name: d for name, d in self.swaps.items() if d < least and name not in case.indifferent}


def measure(case: Case) -> Measured:
    """Builds the pipeline; runs three requests alone and together; swaps arguments, alone."""
    torch.manual_seed(0)
    pipeline = case.build()
    pipeline.set_progress_bar_config(disable=True)
    swaps = _swaps(case, pipeline)
    return Measured(trial.trial(pipeline, [case.request(i) for i in range(3)], case.tolerance), swaps)


def _swaps(case: Case, pipeline: Any) -> dict[str, float]:
    first, second = case.inputs(0), case.inputs(1)
    changes = {name: second[name] for name in second if not _same(first.get(name), second[name])} | {"seed": 101}
    plain = trial.run_alone(pipeline, case.request(0))
    return {
        name: trial.distance(trial.run_alone(pipeline, case.request(0, **{name: value})), plain)
        for name, value in changes.items()
    }


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    return bool(one == other) if not hasattr(one, "shape") else bool((one == other).all())


def main(names: list[str]) -> None:
    """Prints a paragraph per case."""
    import conformance.families  # noqa: F401 - registers the cases

    torch.set_num_threads(1)
    for name in names or sorted(CASES):
        case = CASES[name]
        started = time.perf_counter()
        found = measure(case)
        verdict = found.verdict
        print(f"{name}: equal={verdict.equal} batched={verdict.batched} share={verdict.share:.2f}")
        print(f"  distances {[f'{d:.1e}' for d in verdict.distances]}  {time.perf_counter() - started:.1f} s")
        print(f"  swaps { ({n: f'{d:.1e}' for n, d in found.swaps.items()}) }  careless {found.careless(case)}")
        print(f"  alone {dict(verdict.reasons)}")
        if verdict.error:
            print(verdict.error)


if __name__ == "__main__":
    main(sys.argv[1:])
