"""Warming up at start: what compiles or is captured at first use does so before the first request, and tells."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from steploom.config import EngineConfig
from steploom.protocol import NewRequest, PipelineInfo, SchedulerOutput
from steploom.requests import DiffusionRequest

if TYPE_CHECKING:
    from steploom.worker.runner import Runner

log = logging.getLogger(__name__)

_SMALL = 256
"""Pixels of the longer side of a warm-up video, and of what a pipeline without a size of its own is asked for."""
_STEPS = 3
"""Of each request: at the first one a graph is only noticed, at the second it is captured, at the third replayed."""

Plan = Iterator[tuple[str, int, Mapping[str, Any]]]
"""What is said, how many requests, and their arguments."""


def warm_up(runner: Runner, config: EngineConfig, tell: Callable[[str], None]) -> None:
    """Runs what compiles all there is to compile: several rows, one row, two shapes; and captures each number of calls.

    A pipeline that needs more than a prompt is not warmed up, since what to give it is not ours to say; a request that
    fails ends the warm-up, and is told.
    """
    required = {parameter.name for parameter in runner.info.parameters if parameter.required}
    if not required <= {"prompt"}:
        tell(f"not warming up: {runner.info.pipeline_class} needs {', '.join(sorted(required - {'prompt'}))} as well")
        return
    started = time.perf_counter()
    for words, count, params in plan(runner.info, config):
        tell(f"warming up: {words}")
        fault = _run(runner, count, params)
        if fault is not None:
            log.warning("warming up ended: %s", fault)
            tell(f"warming up ended: {fault}")
            break
    tell(f"warmed up in {time.perf_counter() - started:.1f} s, {runner.stats().compilations} compilations")
    runner.reset_counts()


def plan(info: PipelineInfo, config: EngineConfig) -> Plan:
    """The rounds of a warm-up, within the limits that requests have."""
    known = {parameter.name for parameter in info.parameters}
    usual = {name: value for name, value in _arguments(info, config).items() if name in known}
    several = min(3, config.batch_limit)
    if config.compile:
        oblong = {**usual, **(_oblong(info, usual) if {"width", "height"} <= known else {})}
        yield f"{several} requests", several, oblong
        yield "one request", 1, usual
        if "guidance_scale" in known:
            yield "one request without guidance", 1, {**usual, "guidance_scale": 1.0}
    if config.cuda_graphs:
        count = 1
        while count < 2 * config.batch_limit:
            now = min(count, config.batch_limit)
            yield f"{now} requests", now, usual
            count *= 2


def _arguments(info: PipelineInfo, config: EngineConfig) -> dict[str, Any]:
    """Few steps of the usual size, which is what kernels are chosen for; a small one where it would take minutes.

    Compiled code serves other sizes as well. A CPU takes long, and so does a whole video.
    """
    arguments: dict[str, Any] = {
        "num_inference_steps": min(_STEPS, config.max_steps),
        "gen_length": min(8, config.max_tokens),
    }
    least = max(info.size_multiple, 1)
    width, height = usual = info.default_size or (_SMALL, _SMALL)
    if "videos" in info.makes:
        arguments["num_frames"] = 1 + info.frame_multiple
    if "videos" in info.makes or info.device == "cpu":
        width, height = (min(side, max(_SMALL // least, 1) * least) for side in usual)
    if width * height > config.max_pixels:
        width = height = int(config.max_pixels**0.5) // least * least
    if (width, height) != info.default_size:
        arguments |= {"width": width, "height": height}
    return arguments


def _oblong(info: PipelineInfo, usual: Mapping[str, Any]) -> dict[str, int]:
    """A size whose sides differ: code that was compiled for a square may be for squares alone."""
    width, height = (usual.get(name) for name in ("width", "height"))
    if width is None or height is None:
        width, height = info.default_size or (_SMALL, _SMALL)
    least = 2 * info.size_multiple
    return {"width": width, "height": max(height // 2 // least * least, min(least, height))}


def _run(runner: Runner, count: int, params: Mapping[str, Any]) -> str | None:
    """Runs so many requests, with texts of different lengths, to their end; why one failed, None if none did."""
    known = {parameter.name for parameter in runner.info.parameters}
    requests = [
        DiffusionRequest(
            "warming up" + ", again" * number if "prompt" in known else None,
            request_id=f"warm-up-{number}", seed=number, output_type="latent", **params,
        )
        for number in range(count)
    ]  # fmt: skip
    new = [NewRequest(request.request_id, request) for request in requests]
    running: list[str] = []
    fault: str | None = None
    tick = 0
    while new or running:
        tick += 1
        gone = [] if fault is None else list(running)
        output = SchedulerOutput(tick=tick, scheduled_new_reqs=new, scheduled_cached_reqs=[] if gone else list(running),
                                 finished_req_ids=gone)  # fmt: skip
        running = [] if gone else running + [request.run_id for request in new]
        new = []
        for report in runner.execute(output).reports:
            if report.finished:
                running.remove(report.run_id)
                fault = fault or (None if report.error is None else report.error.message)
    return fault
