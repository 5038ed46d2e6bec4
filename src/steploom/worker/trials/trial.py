"""Trials: does a pipeline give under weaving what it gives alone, and how much do requests share?

The equality check of the conformance suite and of ``steploom verify``. The oracle is diffusers: ``pipe(...)`` alone.
"""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from steploom.config import EngineConfig
from steploom.errors import GenerationFailed
from steploom.protocol import NewRequest, RequestReport, SchedulerOutput
from steploom.requests import DiffusionRequest
from steploom.weave import signatures, untyped
from steploom.weave.batching.unlike import ONLY_ONE
from steploom.worker.runner import Runner
from steploom.worker.trials.nans import listened_for_nan
from steploom.worker.trials.rounding import rounded_otherwise

TOLERANCE = 1e-4
"""Largest difference in float32, as a share of the scale of what is compared."""

TOLERANCES = {torch.float32: TOLERANCE, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""The same by dtype of the denoiser: at another number of rows a half-precision forward rounds otherwise."""

_AGAIN = 2
"""How often what does not come out equal runs alone again: what it draws may happen to be the same once."""

ROUNDINGS = 4.0
"""What is allowed, in how far the pipeline alone moves when its networks round otherwise, where that is more."""

BATCHED_SHARE = 0.8
"""Share of the denoiser calls, made while all requests ran, that carried all of them, from which we say "batched"."""

APART = "they were not at the same network at once, as in different stages of a cascade"
"""Why calls did not share that had nobody to share with."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a trial found.

    Attributes:
        distances: Per request: largest difference between together and alone, as a share of the scale of the output.
        error: Why there is no output, where a request failed.
        share: Of the denoiser calls made while all requests ran, the share that carried all of them.
        reasons: Why denoiser calls ran alone once everything was learned, and how many.
        alone_s: Seconds for all requests one after the other with ``pipe(...)``.
        together_s: Seconds for all requests at once.
        tolerance: What ``equal`` allows: more than asked for, if the pipeline alone moves as far by rounding.
        unrepeatable: How far the pipeline alone is from itself with the same seed, where that is more than allowed
            (it draws from the global generator): then equality cannot be judged. None if it repeats, or was equal.
        not_finite: Whether the pipeline alone computes NaN or infinity, which equal nothing.
    """

    distances: tuple[float, ...]
    share: float
    reasons: Mapping[str, int]
    alone_s: float
    together_s: float
    tolerance: float = TOLERANCE
    error: str | None = None
    unrepeatable: float | None = None
    not_finite: bool = False

    @property
    def equal(self) -> bool:
        """Whether every request came out as alone."""
        return (
            self.error is None
            and not self.not_finite
            and all(distance <= self.tolerance for distance in self.distances)
        )

    @property
    def batched(self) -> bool:
        """Whether the requests really shared their denoiser calls."""
        return self.share >= BATCHED_SHARE

    @property
    def why_not(self) -> list[tuple[str, int]]:
        """Why they did not, and for how many calls, the most frequent reason first."""
        told = [(reason, count) for reason, count in self.reasons.items() if reason != ONLY_ONE]
        return sorted(told, key=lambda item: -item[1]) or [(APART, self.reasons.get(ONLY_ONE, 0))]


def tolerance_of(pipeline: Any) -> float:
    """What :func:`trial` should allow for a pipeline, by the dtype that it computes in."""
    return max(
        (TOLERANCES.get(getattr(module, "dtype", torch.float32), TOLERANCE)
         for module in untyped.modules_of(pipeline).values()),
        default=TOLERANCE,
    )  # fmt: skip


def run_alone(pipeline: Any, request: DiffusionRequest) -> Any:
    """What ``pipe(...)`` gives for ``request``, alone."""
    arguments: dict[str, Any] = dict(request.params)
    if request.prompt is not None:
        arguments["prompt"] = request.prompt
    arguments = {n: list(v) if type(v) is list else v for n, v in arguments.items()}  # Z-Image writes into its prompts
    accepted = signatures.call_parameters(pipeline)
    if "output_type" in accepted:
        arguments["output_type"] = signatures.output_type(pipeline, request.output_type)
    if "generator" in accepted and request.seed is not None:
        arguments["generator"] = torch.Generator("cpu").manual_seed(request.seed)
    return pipeline(**arguments)


class Together:
    """Runs requests at once on a runner, everything that is resident stepping in every tick."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._ticks = 0
        self.forwards: dict[int, int] = {}

    def run(self, requests: Sequence[DiffusionRequest]) -> dict[str, RequestReport]:
        """The last report of each request by its id.

        ``forwards`` is then how many denoiser forwards carried how many requests while all of them ran.
        """
        new = [NewRequest(request.request_id, request) for request in requests]
        running: list[str] = []
        finished: dict[str, RequestReport] = {}
        self.forwards = {}
        while new or running:
            self._ticks += 1
            output = SchedulerOutput(tick=self._ticks, scheduled_new_reqs=new, scheduled_cached_reqs=list(running))
            running += [request.run_id for request in new]
            new = []
            before = dict(self._runner.counters.denoiser_forwards)
            reports = self._runner.execute(output).reports
            if len(running) == len(requests):
                for size, count in self._runner.counters.denoiser_forwards.items():
                    self.forwards[size] = self.forwards.get(size, 0) + count - before.get(size, 0)
            for report in reports:
                if report.finished:
                    running.remove(report.run_id)
                    finished[report.run_id] = report
        return finished


def trial(pipeline: Any, requests: Sequence[DiffusionRequest], tolerance: float = TOLERANCE) -> Verdict:
    """Runs ``requests`` alone and together and compares. Together runs twice: the first is warm-up (axes, checks).

    Args:
        pipeline: A pipeline on its device; not modified.
        requests: Different in seed and steps, with ids of their own.
        tolerance: See :data:`TOLERANCE`.

    Raises:
        GenerationFailed: The pipeline cannot do one of them alone.
    """
    started = time.perf_counter()
    try:
        with listened_for_nan(pipeline) as heard:
            expected = [run_alone(pipeline, request) for request in requests]
    except Exception as fault:
        words = f"{type(pipeline).__name__} alone, without steploom: {type(fault).__name__}: {fault}"
        raise GenerationFailed(words, remote_traceback=traceback.format_exc()) from fault
    alone_s = time.perf_counter() - started
    runner = Runner.from_pipeline(pipeline, EngineConfig())
    together = Together(runner)
    first = together.run(requests)
    learned = dict(runner.counters.denoiser_alone)
    started = time.perf_counter()
    second = together.run(requests)
    together_s = time.perf_counter() - started
    full, calls = together.forwards.get(len(requests), 0), sum(together.forwards.values())
    distances: list[float] = []
    error: str | None = None
    for reports in (first, second):
        for request, alone in zip(requests, expected, strict=True):
            report = reports[request.request_id]
            if report.error is not None:
                error = error or report.error.traceback or report.error.message
            else:
                distances.append(distance(report.output, alone))
    reasons = {reason: count - learned.get(reason, 0) for reason, count in runner.counters.denoiser_alone.items()}
    verdict = Verdict(
        tuple(distances), full / calls if calls else 0.0, {reason: n for reason, n in reasons.items() if n}, alone_s,
        together_s, tolerance, error, not_finite=bool(heard) and not _has_floats(expected),
    )  # fmt: skip
    if verdict.not_finite:
        return verdict
    return verdict if verdict.equal or error is not None else _judged(verdict, pipeline, requests, expected)


def _judged(verdict: Verdict, pipeline: Any, requests: Sequence[DiffusionRequest], expected: Sequence[Any]) -> Verdict:
    """What can be said of a pipeline that is not equal, by how far it alone is from itself."""
    if not all(map(_is_finite, arrays(expected))):
        return dataclasses.replace(verdict, not_finite=True)
    apart = _apart_from_itself(pipeline, requests, expected)
    if apart > verdict.tolerance:
        return dataclasses.replace(verdict, unrepeatable=apart)
    with rounded_otherwise(pipeline):
        rounding = _apart_from_itself(pipeline, requests, expected)
    return dataclasses.replace(verdict, tolerance=max(verdict.tolerance, ROUNDINGS * rounding))


def _apart_from_itself(pipeline: Any, requests: Sequence[DiffusionRequest], expected: Sequence[Any]) -> float:
    """How far the pipeline alone is from what it gave alone before, with the same seeds."""
    pairs = list(zip(requests, expected, strict=True)) * _AGAIN
    return max(distance(run_alone(pipeline, request), before) for request, before in pairs)


def distance(one: Any, other: Any) -> float:
    """Largest difference between two outputs as a share of the scale of the second; infinite if they differ in kind.

    Text and tokens are equal (0) or not (infinite). Pictures of bytes may differ by one level, which is rounding.
    """
    ours, theirs = list(arrays(one)), list(arrays(other))
    if not theirs or len(ours) != len(theirs):
        return float("inf")
    return max(_array_distance(a, b) for a, b in zip(ours, theirs, strict=True))


def _array_distance(one: Any, other: Any) -> float:
    if isinstance(one, str) or isinstance(other, str):
        return 0.0 if one == other else float("inf")
    if one.shape != other.shape:
        return float("inf")
    if one.dtype == other.dtype == np.uint8:
        levels = float(np.abs(one.astype(np.int16) - other).max(initial=0))
        return levels / 255 if levels > 1 else 0.0
    if one.dtype.kind in "iub":
        return 0.0 if np.array_equal(one, other) else float("inf")
    scale = float(np.abs(other).max(initial=0.0)) or 1.0
    worst = float(np.abs(one - other).max(initial=0.0)) / scale
    return worst if np.isfinite(worst) else float("inf")


def _has_floats(expected: Sequence[Any]) -> bool:
    """Whether NaN would be seen in the outputs; it is not in tokens and texts, which are equal all the same."""
    return any(not isinstance(value, str) and value.dtype.kind == "f" for value in arrays(expected))


def _is_finite(value: Any) -> bool:
    return isinstance(value, str) or value.dtype.kind != "f" or bool(np.isfinite(value).all())


def arrays(output: Any) -> Iterator[Any]:
    """The arrays and strings in a pipeline's output, in order; numbers as float64, bytes and tokens as they are."""
    if isinstance(output, torch.Tensor):
        value = output.detach().cpu()
        yield (value.double() if value.is_floating_point() else value).numpy()
    elif isinstance(output, np.ndarray):
        yield output.astype(np.float64) if output.dtype.kind == "f" else output  # pyright: ignore
    elif isinstance(output, str):
        yield output
    elif hasattr(output, "getdata") and hasattr(output, "mode"):  # a PIL image
        yield np.asarray(output)
    elif isinstance(output, Mapping):
        for value in output.values():  # pyright: ignore[reportUnknownVariableType]
            yield from arrays(value)
    elif isinstance(output, (list, tuple)):
        for value in output:  # pyright: ignore[reportUnknownVariableType]
            yield from arrays(value)
    elif dataclasses.is_dataclass(output):
        for field in dataclasses.fields(output):
            yield from arrays(getattr(output, field.name))
