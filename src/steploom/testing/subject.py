"""The executor that is checked: one life of it, and what every clause asks of it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Generator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import anyio
import anyio.lowlevel

from steploom.config import EngineConfig
from steploom.executor.abstract import DiffusionExecutor
from steploom.protocol import NewRequest, PipelineInfo, RequestReport, RunnerOutput, SchedulerOutput, run_id
from steploom.requests import DiffusionRequest
from steploom.threads import at_once

Call = Callable[[], Awaitable[Any]]

STEPS = 4
"""``num_inference_steps`` of the requests, where the pipeline has it and nothing else was said."""
MOST_TICKS = 1000
"""Ticks that a request may take."""
JOIN_S = 2.0
"""How long a thread may take to end after the executor has."""
POOLS = ("asyncio_", "AnyIO worker thread")
"""Names of threads that belong to the event loop."""
LASTING = ("/dev/", "/memfd:")
"""What libraries open once and keep: devices, and memory."""


class Stray(RuntimeError):
    """A ``CancelledError`` came that nobody had sent, or that took the place of one that somebody had."""


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
        self._going: set[str] = set()  # runs that were asked for, and neither finished nor ended since
        self._aside: set[str] = set()
        with self.clause("start"):
            self.executor = kind(config)

    def broken(self, clause: str, what: str) -> NoReturn:
        """The executor breaks the contract.

        Raises:
            AssertionError: Always.
        """
        raise AssertionError(self._breach(clause, what))

    def _breach(self, clause: str, what: str) -> str:
        return f"{self.kind.__name__} breaks the contract of executors, clause {clause!r}: {what}"

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
        except asyncio.CancelledError as error:
            if _is_cancelled():
                raise
            raise AssertionError(self._breach(name, STRAY)) from error
        except Exception as error:
            message = f"raised {type(error).__name__}: {error}"
            raise AssertionError(self._breach(name, message)) from error
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

    def request(self, seed: int = 1, **params: Any) -> DiffusionRequest:
        """A request like all others, but for its id and seed."""
        self._requests += 1
        return DiffusionRequest(
            self._prompt, seed=seed, request_id=f"check-{self._requests}", **{**self._params, **params}
        )

    def new(self, seed: int = 1) -> NewRequest:
        """A request that joins."""
        request = self.request(seed)
        new = NewRequest(run_id(request.request_id, 0), request)
        self._going.add(new.run_id)
        return new

    def decide(
        self, *new: NewRequest, cached: list[str] | None = None, ended: list[str] | None = None
    ) -> SchedulerOutput:
        """The next tick."""
        self._tick += 1
        self._going -= {*(ended or [])}
        return SchedulerOutput(self._tick, list(new), cached or [], ended or [])

    async def tick(
        self, *new: NewRequest, cached: list[str] | None = None, ended: list[str] | None = None
    ) -> dict[str, RequestReport]:
        """Executes one tick; its reports by run id. Clause ``ticks``."""
        output = self.decide(*new, cached=cached, ended=ended)
        with self.clause("ticks", self.config.tick_timeout_s + self.limit_s):
            result = await self.executor.execute_step(output)
        return self.take(output, result)

    def take(
        self, output: SchedulerOutput, result: Any, amendment: SchedulerOutput | None = None
    ) -> dict[str, RequestReport]:
        """The reports of an answer, by run id."""
        self.require(isinstance(result, RunnerOutput), "ticks", f"execute_step returned {result!r}, no RunnerOutput")
        self.require(result.tick == output.tick, "ticks", f"tick {output.tick} was answered as tick {result.tick}")
        sent, told = int(amendment is not None), result.amendments
        self.require(0 <= told <= sent, "ticks", f"amendments={told} of tick {output.tick}, which was sent {sent}")
        named = {*output.run_ids, *(amendment.run_ids if amendment is not None and told else ())}
        reports: dict[str, RequestReport] = {}
        for report in result.reports:
            self.require(report.run_id not in reports, "ticks", f"two reports for {report.run_id} in one tick")
            reports[report.run_id] = report
            asked = report.run_id in named or report.run_id in self._aside
            self.require(asked, "ticks", f"a report on {report.run_id}, which tick {output.tick} does not name")
            self._look(report)
        missing = (named & self._going) - set(reports)
        self.require(not missing, "ticks", f"no report on {sorted(missing)}, which tick {output.tick} names")
        self._aside = {run for run, report in reports.items() if report.aside and not report.finished}
        self._going -= {run for run, report in reports.items() if report.finished}
        return reports

    def _look(self, report: RequestReport) -> None:
        """What a report says of itself."""
        run, step, total = report.run_id, report.step, report.total_steps
        steps = step - self._steps.get(run, 0)
        self.require(steps <= 1, "ticks", f"{run} advanced by {steps} steps in one tick; 1 is the most")
        self._steps[run] = step
        self.require(total is None or step <= total, "ticks", f"{run} has done {step} steps of {total} in all")
        given = (report.output is None) != (report.error is None)
        self.require(
            not report.finished or given, "ticks", f"{run} is finished, which needs either its output or an error"
        )

    async def finish(self, runs: list[str], known: dict[str, RequestReport] | None = None) -> dict[str, RequestReport]:
        """Ticks until all ``runs`` are finished; their last reports. Clause ``ticks``."""
        done = {run: report for run, report in (known or {}).items() if report.finished and run in runs}
        for _ in range(MOST_TICKS):
            waiting = [run for run in runs if run not in done]
            if not waiting:
                break
            reports = await self.tick(cached=waiting)
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


STRAY = "raised a CancelledError that nobody had sent, or in the place of one that somebody had"


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def together(*calls: Call) -> list[Any]:
    """What each call returned or raised, all of them begun in order; :class:`Stray` where that is no answer at all."""
    results: list[Any] = [Stray(STRAY) for _ in calls]

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


class Held(NamedTuple):
    """What this process holds."""

    tasks: frozenset[asyncio.Task[Any]]
    threads: frozenset[threading.Thread]
    processes: frozenset[str]
    descriptors: int
    files: Counter[str]


async def held() -> Held:
    """What this process holds, once what is about to end has ended."""
    for _ in range(10):
        await anyio.lowlevel.checkpoint()
    gc.collect()
    threads = frozenset(thread for thread in threading.enumerate() if not thread.name.startswith(POOLS))
    return Held(frozenset(asyncio.all_tasks()), threads, _children(), _descriptors(), _files())


def _descriptors() -> int:
    """How many files and sockets this process has open, where the system lists them."""
    there = Path("/dev/fd")
    return len(list(there.iterdir())) if there.exists() else 0


def _files() -> Counter[str]:
    """Paths of the files that this process has open, where the system tells."""
    found: Counter[str] = Counter()
    there = Path("/proc/self/fd")
    for one in there.iterdir() if there.exists() else ():
        with contextlib.suppress(OSError):  # the folder's own
            target = str(one.readlink())
            found[target] += target == os.devnull or (target.startswith("/") and not target.startswith(LASTING))
    return found


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
        await at_once(partial(thread.join, JOIN_S))
