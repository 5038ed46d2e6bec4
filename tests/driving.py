"""Drives a runner by hand, tick by tick, and compares with the pipeline alone: diffusers is the oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from steploom.protocol import NewRequest, RequestReport, RunnerOutput, SchedulerOutput
from steploom.requests import DiffusionRequest
from steploom.worker.runner import Runner

LATENT_TOLERANCE = 1e-4
"""Of the scale of the latents."""


def alone(pipe: Any, request: DiffusionRequest) -> Any:
    """What ``pipe(...)`` gives for this request, alone."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(request.seed)
    return pipe(prompt=request.prompt, generator=generator, output_type=request.output_type, **request.params)


class Driver:
    """A minimal scheduler: everything that is resident steps in every tick."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.running: list[str] = []
        self.finished: dict[str, RequestReport] = {}
        self.reports: dict[str, list[RequestReport]] = {}
        self.ticks = 0
        self._gone: list[str] = []

    def tick(self, join: Iterable[DiffusionRequest] = ()) -> RunnerOutput:
        self.ticks += 1
        new = [NewRequest(request.request_id, request) for request in join]
        output = SchedulerOutput(
            tick=self.ticks,
            scheduled_new_reqs=new,
            scheduled_cached_reqs=list(self.running),
            finished_req_ids=self._gone,
        )
        self._gone = []
        self.running += [request.run_id for request in new]
        result = self.runner.execute(output)
        for report in result.reports:
            self.reports.setdefault(report.run_id, []).append(report)
            if report.finished:
                self.running.remove(report.run_id)
                self.finished[report.run_id] = report
        return result

    def cancel(self, run_id: str) -> None:
        self.running.remove(run_id)
        self._gone.append(run_id)

    def drain(self, waiting: Iterable[DiffusionRequest] = (), joining: int = 10**6) -> dict[str, RequestReport]:
        queue = list(waiting)
        while queue or self.running:
            self.tick(queue[:joining])
            del queue[:joining]
        return self.finished

    def sharing(self, run_id: str) -> list[float]:
        """How many requests shared each of its denoiser ticks."""
        return [report.batch_requests for report in self.reports[run_id] if report.batch_requests]


def tensor_of(output: Any) -> torch.Tensor:
    value = output[0] if not isinstance(output, torch.Tensor) else output
    return value if isinstance(value, torch.Tensor) else torch.as_tensor(value)


def distance(one: Any, other: Any) -> float:
    """Largest difference as a share of the scale of the reference."""
    a, b = tensor_of(one).double(), tensor_of(other).double()
    assert a.shape == b.shape
    assert bool(a.isfinite().all())
    assert a.std() > 1e-3 * a.abs().max(), "a constant output proves nothing"
    return ((a - b).abs().max() / b.abs().max()).item()


def assert_equal_to_alone(
    build: Callable[[], Any],
    requests: list[DiffusionRequest],
    tolerance: float = LATENT_TOLERANCE,
    joining: int = 10**6,
) -> tuple[Driver, Any]:
    """Runs all requests together and compares each with the pipeline alone; returns the driver and the pipeline."""
    pipe = build()
    expected = {request.request_id: alone(pipe, request) for request in requests}
    assert_cares(expected, tolerance)
    driver = Driver(Runner.from_pipeline(pipe, config()))
    finished = driver.drain(requests, joining)
    for request in requests:
        report = finished[request.request_id]
        assert report.error is None, report.error and report.error.traceback
        assert distance(report.output, expected[request.request_id]) <= tolerance, request.request_id
    return driver, pipe


def assert_cares(expected: dict[str, Any], tolerance: float) -> None:
    """Different requests must differ by at least 20 times the tolerance, else equality means nothing."""
    outputs = [tensor_of(output).double() for output in expected.values()]
    for i, one in enumerate(outputs):
        for other in outputs[:i]:
            if one.shape == other.shape:
                assert ((one - other).abs().max() / one.abs().max()).item() > 20 * tolerance


def config(**changes: Any) -> Any:
    from steploom.config import EngineConfig

    return EngineConfig(**changes)


def request(name: str, prompt: str, seed: int = 0, output_type: str = "latent", **params: Any) -> DiffusionRequest:
    return DiffusionRequest(prompt, request_id=name, seed=seed, output_type=output_type, **params)
