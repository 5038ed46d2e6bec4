"""A worker of several ranks: rank 0 starts the others, and they do what it does (:mod:`steploom.worker.ranks.spmd`)."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from steploom import codec
from steploom.config import EngineConfig, worker_environment
from steploom.protocol import ErrorInfo, PipelineInfo, RequestReport, RunnerOutput, SchedulerOutput
from steploom.worker.memory import still
from steploom.worker.messages import Call, Close, Configure, Tick
from steploom.worker.ranks import spmd
from steploom.worker.ranks.spmd import Begin, Did, Failed, First, Link, Other, lose
from steploom.worker.serving import RunnerLike, runner_factory


class Group:
    """The runner of rank 0, and with it those of all others. Makes this process rank 0.

    Args:
        store: Path of a file, not there yet, in a folder that only this user can enter.
        runner_name: Name of the factory of each rank's runner.
        config: The engine's; it asks for several ranks.
        tell: Hears of progress, of rank 0's only.

    Raises:
        SteploomError: The model cannot be loaded, or not be shared.
    """

    def __init__(self, store: str, runner_name: str, config: EngineConfig, tell: Callable[[str], None]) -> None:
        self._store = Path(store)
        self._ending = False
        self._stop_s = 0.6 * config.process_stop_s  # so that the engine does not lose patience with rank 0 first
        self._processes: list[subprocess.Popen[bytes]] = []
        links = [self._start(index, runner_name) for index in range(1, config.ranks)]
        self._rank = First(links, store, config.ranks_agree_timeout_s, config.last_words_timeout_s)
        spmd.join(self._rank)
        try:
            for index, link in enumerate(links, 1):
                own = dataclasses.replace(config, device=shifted(config.device, index))
                link.say(Begin(Configure.of(own), index, config.ranks, store))
            self._runner: RunnerLike = runner_factory(runner_name)(config, tell)
            self._rank.meet()
        except BaseException:
            self._end(0.0)
            raise
        self._rank.trust(packages_of(self._runner))

    def _start(self, index: int, runner_name: str) -> Link:
        """Starts one of the others, in this process's group; what it prints comes out where this one's does."""
        mine, its = socket.socketpair()
        with its:
            command = [sys.executable, "-P", "-m", "steploom.worker", "--link", str(its.fileno())]
            process = subprocess.Popen(
                [*command, "--runner", runner_name],
                stdin=subprocess.PIPE,  # its end is this process's
                env=worker_environment(),
                pass_fds=(its.fileno(),),
            )
        self._processes.append(process)
        threading.Thread(target=self._watch, args=(index, process), name=f"steploom-rank-{index}", daemon=True).start()
        return Link(mine.detach())

    def _watch(self, index: int, process: subprocess.Popen[bytes]) -> None:
        """The end of a rank is the end of its worker: whoever waits for it in a forward would wait for ever."""
        exitcode = process.wait()
        if not self._ending:
            lose(f"rank {index} died with exit code {exitcode}")

    @property
    def info(self) -> PipelineInfo:
        """What the pipeline accepts."""
        return self._runner.info

    @property
    def pipeline(self) -> Any:
        """Rank 0's."""
        return getattr(self._runner, "pipeline", None)

    def execute(self, output: SchedulerOutput) -> RunnerOutput:
        """One tick, in all ranks. What is said of memory is of the one that has least."""
        self._rank.tell(Tick(output))
        result, fault = _attempt(lambda: self._runner.execute(output))
        did = outcome_of(result, fault)
        others = self._rank.compare(did)
        if result is None:
            raise fault
        rooms = [one.room_bytes for one in (did, *others)]
        result.room_bytes = min(rooms)
        result.peak_bytes = max(one.peak_bytes for one in (did, *others))
        return result

    def call(self, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """A collective RPC, in all ranks; the answer is rank 0's."""
        self._rank.tell(Call(0, method, list(args), dict(kwargs)))
        result, fault = _attempt(lambda: (self._runner.call(method, args, kwargs),))
        self._rank.compare(outcome_of(None, fault))
        if result is None:
            raise fault
        return result[0]

    def close(self) -> None:
        """Unwinds all programs and ends the other ranks. Idempotent."""
        if self._ending:
            return
        self._ending = True
        self._rank.tell(Close())
        self._runner.close()
        self._end(self._stop_s)

    def _end(self, seconds: float) -> None:
        self._ending = True
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                if seconds:
                    process.wait(seconds)
            process.kill()
            process.wait()
        self._store.unlink(missing_ok=True)


def shifted(device: str, index: int) -> str:
    """The device of rank ``index`` where rank 0 has ``device``: of several GPUs the next ones."""
    kind, _, number = device.partition(":")
    return f"{kind}:{int(number or 0) + index}" if kind in ("auto", "cuda") else device


def packages_of(runner: RunnerLike) -> tuple[str, ...]:
    """The packages whose dataclasses may travel."""
    return (*codec.PACKAGES, type(getattr(runner, "pipeline", None)).__module__.partition(".")[0])


def _attempt(run: Callable[[], Any]) -> tuple[Any, Exception]:
    """What it returned, or None and what it raised."""
    try:
        return run(), Exception()
    except Exception as fault:  # noqa: BLE001 - raised again once the other ranks have said that they did so too
        return None, fault


def outcome_of(result: RunnerOutput | None, fault: Exception) -> Did:
    """What ranks have to agree in, of a tick or a call."""
    if result is None:
        return Did([type(fault).__name__])
    return Did([_outline(report) for report in result.reports], result.room_bytes, result.peak_bytes)


def _outline(report: RequestReport) -> list[Any]:
    error = None if report.error is None else report.error.kind
    shared = [report.batch_key, report.batch_requests, report.rows, report.skipped_steps]
    return [report.run_id, report.phase, report.step, report.total_steps, report.finished, error, *shared]


def follow(descriptor: int, runner_name: str) -> int:
    """Is a rank that rank 0 has started, until that says so, or has ended.

    Args:
        descriptor: Of the connection with it.
        runner_name: Name of the factory of the runner.

    Returns:
        Exit code.
    """
    link = Link(descriptor)
    try:
        begin = link.hear()
        assert isinstance(begin, Begin)
        config = begin.config.restore()
        rank = Other(begin.index, begin.size, begin.store, link, config.ranks_agree_timeout_s)
        spmd.join(rank)
        try:
            runner = runner_factory(runner_name)(config, lambda line: None)
            rank.meet()
        except Exception as error:  # noqa: BLE001 - the process boundary: rank 0 hears of it
            return _failed(rank, link, error)
        still.freeze()
        link.packages = packages_of(runner)
        while _obey(link, runner):
            pass
        runner.close()
    except (EOFError, OSError):
        return 1  # rank 0 is gone
    return 0


def _failed(rank: Other, link: Link, error: Exception) -> int:
    """Tells rank 0 why this one cannot go on; that decides what becomes of it, if it can still hear."""
    if rank.met:
        lose(f"rank {rank.index} could not begin: {type(error).__name__}: {error}")
    link.say(Failed(ErrorInfo.of(error, "".join(traceback.format_exception(error)))))
    link.hear()
    return 1


def _obey(link: Link, runner: RunnerLike) -> bool:
    """Does one thing that rank 0 does; False if that is the end."""
    word = link.hear()
    if isinstance(word, Tick):
        output = word.output
        result, fault = _attempt(lambda: runner.execute(output))
        link.say(outcome_of(result, fault))
    elif isinstance(word, Call):
        call = word
        _, fault = _attempt(lambda: (runner.call(call.method, call.args, call.kwargs),))
        link.say(outcome_of(None, fault))
    else:
        return False
    return True
