"""The cases of ``benchmarks/scheduler.py``: each gives the seconds of what it measures, once for each repetition."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator
from typing import Any

from steploom.config import EngineConfig
from steploom.errors import RequestCancelled
from steploom.protocol import RequestReport, RunnerOutput
from steploom.requests import DiffusionRequest, StepEvent
from steploom.sched import SchedulerInterface, build_scheduler

WAITING = 10_000
ERROR = RequestCancelled("benchmark")


def scheduler(running: int, waiting: int, shapes: int, places: int | None = 0) -> tuple[SchedulerInterface, list[str]]:
    """A scheduler with ``running`` residents of one batch key that are stepping, and ``waiting`` requests of ``shapes``
    shapes; with the residents' run ids. ``places``: of the worker; None for the default, 0 for as many as run."""
    places = running if places == 0 else places
    built = build_scheduler(EngineConfig(max_batch=running, max_resident=places, max_waiting=WAITING + running))
    for index in range(running):
        built.add_request(DiffusionRequest(request_id=f"run{index}", seed=1, height=512, width=512))
    output = built.schedule()
    built.update_from_output(output, answer(output.tick, output.run_ids))
    for index in range(waiting):
        size = 512 + index % shapes
        built.add_request(DiffusionRequest(request_id=f"wait{index}", seed=1, height=size, width=512))
    return built, output.run_ids


def answer(tick: int, run_ids: list[str], ended: int = 0) -> RunnerOutput:
    """One step of each request, as a worker reports it; the last one for the first ``ended``."""
    reports = [
        RequestReport(
            run_id=run,
            phase="denoise",
            stepped=True,
            step=tick,
            total_steps=20,
            sigma=0.5,
            batch_key="transformer 512x512",
            batch_requests=len(run_ids),
            rows=2,
            denoise_s=0.001,
            finished=index < ended,
        )
        for index, run in enumerate(run_ids)
    ]
    return RunnerOutput(tick=tick, reports=reports)


def ticks(running: int, waiting: int, shapes: int, repeat: int, places: int | None = 0) -> Iterator[float]:
    """Seconds of ``schedule()`` and ``update_from_output()`` together, tick by tick."""
    built, run_ids = scheduler(running, waiting, shapes, places)
    for tick in range(2, repeat + 2):
        result = answer(tick, run_ids)
        start = time.perf_counter()
        output = built.schedule()
        events = built.update_from_output(output, result)
        yield time.perf_counter() - start
        assert len(events) == len(output.scheduled_cached_reqs) == running
        assert all(isinstance(event, StepEvent) for event in events)


def mixed(running: int, shapes: int, waiting: int, repeat: int) -> Iterator[float]:
    """Seconds of ticks of one group after the other: residents are of so many shapes, and so are those that wait."""
    now = [0.0]
    config = EngineConfig(max_batch=running, max_resident=running, max_waiting=WAITING + running)
    built = build_scheduler(config, lambda: now[0])

    def tick() -> float:
        start = time.perf_counter()
        output = built.schedule()
        decided = time.perf_counter()
        result = answer(output.tick, output.run_ids)
        key = int(output.run_ids[0].partition("#")[0]) % shapes
        result.seconds = 0.02
        for report in result.reports:
            report.batch_key, report.total_steps = f"transformer {key}", 1000
        now[0] += 0.02
        answered = time.perf_counter()
        built.update_from_output(output, result)
        return time.perf_counter() - answered + decided - start

    for index in range(running + waiting):
        size = 512 + index % shapes
        built.add_request(
            DiffusionRequest(request_id=str(index), seed=1, height=size, width=512, num_inference_steps=1000)
        )
        if index == running - 1:
            for _ in range(10 * shapes):
                tick()
    for _ in range(repeat):
        yield tick()


def joins(running: int, guesses: int, distinct: bool, repeat: int) -> Iterator[float]:
    """Seconds of ticks in which one request joins and one ends; another arrives, so that 10,000 wait each time.

    The requests are of ``guesses`` guesses that share one observed key; ``distinct``: each has a priority of its own.
    """
    built = build_scheduler(EngineConfig(max_batch=running, max_resident=running, max_waiting=2 * WAITING))
    arrivals = itertools.count()

    def arrive() -> None:
        index = next(arrivals)
        priority = index * 7919 % 1_000_003 if distinct else 0
        height = 512 + index % guesses
        built.add_request(DiffusionRequest(request_id=f"r{index}", seed=1, height=height, width=512, priority=priority))

    def tick(ended: int) -> float:
        start = time.perf_counter()
        output = built.schedule()
        decided = time.perf_counter()
        result = answer(output.tick, output.run_ids, ended)
        answered = time.perf_counter()
        built.update_from_output(output, result)
        return time.perf_counter() - answered + decided - start

    for _ in range(guesses):  # Each guess is seen once, so that all turn out to have one key.
        arrive()
    while built.has_work:
        tick(running)
    for _ in range(WAITING + running):
        arrive()
    tick(1)
    for _ in range(repeat):
        arrive()
        yield tick(1)
        assert built.num_running == running - 1
        assert built.num_waiting == WAITING


def lives(running: int, steps: int, repeat: int) -> Iterator[float]:
    """Seconds of a tick on average over the lives of requests of so many steps, of which 10,000 wait.

    They have joined one after another, so that in each tick as many end, and join, as with arrivals at random.
    """
    built = build_scheduler(EngineConfig(max_batch=running, max_resident=running, max_waiting=2 * WAITING))
    arrivals = itertools.count()
    taken: dict[str, int] = {}

    def arrive() -> None:
        index = next(arrivals)
        built.add_request(DiffusionRequest(request_id=f"r{index}", seed=1, height=512, width=512))

    def tick() -> float:
        start = time.perf_counter()
        output = built.schedule()
        decided = time.perf_counter()
        ended = 0
        for run in output.run_ids:  # the first of all have had some steps already
            taken.setdefault(run, len(taken) * steps // running if len(taken) < running else 0)
            taken[run] += 1
        runs = sorted(output.run_ids, key=lambda run: -taken[run])
        while ended < len(runs) and taken[runs[ended]] >= steps:
            ended += 1
        result = answer(output.tick, runs, ended)
        for report in result.reports:
            report.step, report.total_steps = taken[report.run_id], steps
        answered = time.perf_counter()
        built.update_from_output(output, result)
        spent = time.perf_counter() - answered + decided - start
        for _ in range(ended):
            arrive()
        return spent

    for _ in range(WAITING + running):
        arrive()
    for _ in range(2 * steps):
        tick()
    for _ in range(repeat // steps):
        yield statistics.fmean(tick() for _ in range(steps))


def sizes(count: int, before: int, repeat: int) -> Iterator[float]:
    """Seconds of ticks in which one request ends and another one comes, of so many sizes with keys of their own.

    Others are 8 running and 10,000 waiting; ``before``: so many ticks are not counted.
    """
    now = [0.0]
    built = build_scheduler(EngineConfig(max_batch=8, max_resident=8, max_waiting=2 * WAITING), lambda: now[0])
    arrivals = itertools.count()

    def arrive() -> None:
        index = next(arrivals)
        height = 256 + 8 * (index % count)
        built.add_request(
            DiffusionRequest(request_id=str(index), seed=1, height=height, width=512, num_inference_steps=20)
        )

    for _ in range(WAITING + 8):
        arrive()
    for tick in range(before + repeat):
        start = time.perf_counter()
        output = built.schedule()
        decided = time.perf_counter()
        result = answer(output.tick, output.run_ids, 1)
        result.seconds = 0.02
        for report in result.reports:
            report.batch_key = f"transformer {int(report.run_id.partition('#')[0]) % count}"
        now[0] += 0.02
        answered = time.perf_counter()
        built.update_from_output(output, result)
        if tick >= before:
            yield time.perf_counter() - answered + decided - start
        arrive()


def firsts(own: dict[str, Any], repeat: int) -> Iterator[float]:
    """Seconds of the first ticks, while 10,000 wait of a kind of which nothing is known: all are estimated anew."""
    built = build_scheduler(EngineConfig(max_batch=8, max_resident=8, max_waiting=WAITING))
    for index in range(WAITING):
        built.add_request(DiffusionRequest(request_id=f"r{index}", seed=1, height=512, width=512, **own))
    for _ in range(repeat):
        start = time.perf_counter()
        output = built.schedule()
        decided = time.perf_counter()
        result = answer(output.tick, output.run_ids)
        result.seconds = 0.02
        answered = time.perf_counter()
        built.update_from_output(output, result)
        yield time.perf_counter() - answered + decided - start


def aborts(shapes: int, distinct: bool, repeat: int) -> Iterator[float]:
    """Seconds of one abort of a waiting request; another takes its place, so that as many wait each time."""
    built, _ = scheduler(8, 0, 1)

    def arrive(index: int, turn: int) -> None:
        priority = turn * WAITING + index if distinct else 0
        built.add_request(
            DiffusionRequest(
                request_id=f"wait{index}", seed=1, height=512 + index % shapes, width=512, priority=priority
            )
        )

    for index in range(WAITING):
        arrive(index, 0)
    for turn in range(repeat):
        index = (turn * 7919) % WAITING  # All over the queue: 7919 is prime.
        start = time.perf_counter()
        events = built.finish_requests((f"wait{index}",), ERROR)
        yield time.perf_counter() - start
        assert len(events) == 1
        arrive(index, turn + 1)


def submissions(waiting: int, repeat: int) -> Iterator[float]:
    """Seconds of accepting one request, which is then aborted."""
    built, _ = scheduler(8, waiting - 1, 1)
    yield from _accepting(built, repeat, guidance_scale=4.0)


def timed(waiting: int, repeat: int) -> Iterator[float]:
    """Seconds of accepting one request with a timeout, where the hopeless are refused; it is aborted then."""
    config = EngineConfig(max_batch=8, max_resident=8, max_waiting=WAITING + 8, refuse_hopeless=True)
    built = build_scheduler(config)
    for index in range(8 + waiting):
        built.add_request(DiffusionRequest(request_id=f"r{index}", seed=1, height=512, width=512))
    for _ in range(5):  # Before anything is measured nobody is hopeless.
        output = built.schedule()
        result = answer(output.tick, output.run_ids)
        result.seconds = 0.02
        built.update_from_output(output, result)
    yield from _accepting(built, repeat, timeout=1e6)


def _accepting(built: SchedulerInterface, repeat: int, **own: Any) -> Iterator[float]:
    for turn in range(repeat):
        request = DiffusionRequest(request_id=f"new{turn}", seed=1, height=512, width=512, **own)
        start = time.perf_counter()
        built.add_request(request)
        yield time.perf_counter() - start
        built.finish_requests((request.request_id,), ERROR)
