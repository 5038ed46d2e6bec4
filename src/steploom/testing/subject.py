"""The executor that is checked: one life of it, and what every clause asks of it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import threading
from collections.abc import Awaitable, Callable, Generator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, cast

import anyio
import anyio.lowlevel
import anyio.to_thread

from steploom import codec
from steploom.config import EngineConfig
from steploom.errors import InvalidRequest
from steploom.executor.abstract import DiffusionExecutor
from steploom.protocol import NewRequest, PipelineInfo, RequestReport, RunnerOutput, SchedulerOutput, run_id
from steploom.requests import DiffusionRequest

Call = Callable[[], Awaitable[Any]]

STEPS = 4
"""``num_inference_steps`` of the requests, where the pipeline has it and nothing else was said."""
MOST_TICKS = 1000
"""Ticks that a request may take."""
JOIN_S = 2.0
"""How long a thread may take to end after the executor has."""
POOLS = ("asyncio_", "AnyIO worker thread")
"""Names of threads that belong to the event loop."""


class Subject:
    """One life of an executor, from its construction to its shutdown.

    Args:
        kind: The executor's class.
        config: What it is made with.
        prompt: Of every request.
        params: Of every request.
        limit_s: How long anything may take, but the start.
        echo: Name of a method that returns what it is given.
    """

    def __init__(
        self,
        kind: type[DiffusionExecutor],
        config: EngineConfig,
        prompt: str | list[str] | None,
        params: Mapping[str, Any],
        limit_s: float,
        echo: str | None,
    ) -> None:
        self.kind = kind
        self.config = config
        self.limit_s = limit_s
        self.echo = echo
        self.info = PipelineInfo(pipeline_class="")
        self._prompt = prompt
        self._params = dict(params)
        self._tick = 0
        self._requests = 0
        self._steps: dict[str, int] = {}
        with self.clause("start"):
            self.executor = kind(config)

    def broken(self, clause: str, what: str) -> NoReturn:
        """The executor breaks the contract.

        Raises:
            AssertionError: Always.
        """
        raise AssertionError(f"{self.kind.__name__} breaks the contract of executors, clause {clause!r}: {what}")

    def require(self, holds: bool, clause: str, what: str) -> None:
        """Raises:
        AssertionError: It does not hold.
        """
        if not holds:
            self.broken(clause, what)

    @contextlib.contextmanager
    def clause(self, name: str, limit_s: float | None = None) -> Generator[None]:
        """What happens within is asked by clause ``name``: it takes no longer than the limit, and raises nothing."""
        limit_s = self.limit_s if limit_s is None else limit_s
        try:
            with anyio.move_on_after(limit_s) as scope:
                yield
        except AssertionError:
            raise
        except Exception as error:
            message = f"raised {type(error).__name__}: {error}"
            raise AssertionError(
                f"{self.kind.__name__} breaks the contract of executors, clause {name!r}: {message}"
            ) from error
        if scope.cancelled_caught:
            self.broken(name, f"did not return within {limit_s} s")

    async def start(self) -> None:
        """Starts it. Clause ``start``."""
        lines: list[Any] = []
        with self.clause("start", self.config.start_timeout_s + self.limit_s):
            info: Any = await self.executor.start(lines.append)
        self.require(isinstance(info, PipelineInfo), "start", f"start() returned {info!r}, no PipelineInfo")
        self.info = info
        self.require(all(isinstance(line, str) for line in lines), "start", "on_progress was not told lines of text")
        if any(parameter.name == "num_inference_steps" for parameter in self.info.parameters):
            self._params.setdefault("num_inference_steps", STEPS)

    def request(self, **params: Any) -> DiffusionRequest:
        """A request like all others, but for its id."""
        self._requests += 1
        return DiffusionRequest(
            self._prompt, seed=1, request_id=f"check-{self._requests}", **{**self._params, **params}
        )

    def new(self) -> NewRequest:
        """A request that joins."""
        request = self.request()
        return NewRequest(run_id(request.request_id, 0), request)

    def decide(
        self, *new: NewRequest, cached: list[str] | None = None, ended: list[str] | None = None
    ) -> SchedulerOutput:
        """The next tick."""
        self._tick += 1
        return SchedulerOutput(self._tick, list(new), cached or [], ended or [])

    async def tick(
        self, *new: NewRequest, cached: list[str] | None = None, ended: list[str] | None = None
    ) -> dict[str, RequestReport]:
        """Executes one tick; its reports by run id. Clause ``ticks``."""
        output = self.decide(*new, cached=cached, ended=ended)
        with self.clause("ticks", self.config.tick_timeout_s + self.limit_s):
            result = await self.executor.execute_step(output)
        return self.take(output, result)

    def take(self, output: SchedulerOutput, result: Any) -> dict[str, RequestReport]:
        """The reports of an answer, by run id."""
        self.require(isinstance(result, RunnerOutput), "ticks", f"execute_step returned {result!r}, no RunnerOutput")
        self.require(result.tick == output.tick, "ticks", f"tick {output.tick} was answered as tick {result.tick}")
        reports: dict[str, RequestReport] = {}
        for report in result.reports:
            self.require(report.run_id not in reports, "ticks", f"two reports for {report.run_id} in one tick")
            reports[report.run_id] = report
            steps = report.step - self._steps.get(report.run_id, 0)
            self.require(steps <= 1, "ticks", f"{report.run_id} advanced by {steps} steps in one tick; 1 is the most")
            self._steps[report.run_id] = report.step
            self.require(
                not report.finished or (report.output is None) != (report.error is None),
                "ticks",
                f"{report.run_id} is finished, which needs either its output or an error",
            )
        return reports

    async def finish(self, runs: list[str], known: dict[str, RequestReport] | None = None) -> dict[str, RequestReport]:
        """Ticks until all ``runs`` are finished; their last reports. Clause ``ticks``."""
        done = {run: report for run, report in (known or {}).items() if report.finished and run in runs}
        for _ in range(MOST_TICKS):
            waiting = [run for run in runs if run not in done]
            if not waiting:
                break
            reports = await self.tick(cached=waiting)
            missing = set(waiting) - set(reports)
            self.require(not missing, "ticks", f"no report for {sorted(missing)}, which was scheduled and not finished")
            done.update((run, reports[run]) for run in waiting if reports[run].finished)
        self.require(set(runs) == set(done), "ticks", f"{MOST_TICKS} ticks did not finish {sorted(runs)}")
        for run, report in done.items():
            error = report.error
            self.require(error is None, "ticks", f"{run} failed: {error and error.message}; give params that it takes")
        await self.tick(ended=runs)
        return done

    async def shut(self) -> None:
        """Ends it after a clause that failed, whatever it does."""
        with anyio.CancelScope(shield=True), anyio.move_on_after(self.limit_s), contextlib.suppress(Exception):
            await self.executor.shutdown()


async def together(*calls: Call) -> list[Any]:
    """What each call returned or raised, all of them begun in order."""
    results: list[Any] = [None] * len(calls)

    async def run(index: int, call: Call) -> None:
        try:
            results[index] = await call()
        except Exception as error:  # noqa: BLE001 - a result like others
            results[index] = error

    async with anyio.create_task_group() as group:
        for index, call in enumerate(calls):
            group.start_soon(run, index, call)
            await anyio.lowlevel.checkpoint()
    return results


def bits(output: Any) -> Any:
    """An output as something to be compared; None if it holds what cannot."""
    images: object = getattr(output, "images", None)
    pictures = cast("list[Any]", images) if isinstance(images, list) else []
    if pictures and all(hasattr(image, "tobytes") for image in pictures):
        return [image.tobytes() for image in pictures]
    try:
        return [bytes(frame) for frame in codec.encode(output, packages=(type(output).__module__.partition(".")[0],))]
    except InvalidRequest:
        return None


class Held(NamedTuple):
    """What this process holds."""

    tasks: frozenset[asyncio.Task[Any]]
    threads: frozenset[threading.Thread]
    processes: frozenset[str]
    descriptors: int


async def held() -> Held:
    """What this process holds, once what is about to end has ended."""
    for _ in range(10):
        await anyio.lowlevel.checkpoint()
    gc.collect()
    threads = frozenset(thread for thread in threading.enumerate() if not thread.name.startswith(POOLS))
    return Held(frozenset(asyncio.all_tasks()), threads, _children(), _descriptors())


def _descriptors() -> int:
    """How many files and sockets this process has open, where the system lists them."""
    there = Path("/dev/fd")
    return len(list(there.iterdir())) if there.exists() else 0


def _children() -> frozenset[str]:
    """Ids of this process's children, where the system lists them."""
    lists = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    found: set[str] = set()
    for one in lists:
        with contextlib.suppress(OSError):  # a thread that ended meanwhile
            found.update(one.read_text().split())
    return frozenset(found)


async def ended(threads: frozenset[threading.Thread]) -> None:
    """Returns when these threads have ended, or could have."""
    for thread in threads:
        await anyio.to_thread.run_sync(partial(thread.join, JOIN_S))
