"""A runner without a model, told by ``SchedulerOutput.batch_key`` what to do in a tick. Loads in no time, no torch.

Named to worker processes as ``scripted_runner:make``.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from steploom.config import EngineConfig
from steploom.protocol import PipelineInfo, RequestReport, RunnerOutput, SchedulerOutput


class Gate:
    """Where a runner stands still, in whatever process, until the test opens it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.setblocking(False)
        self._listener.bind(str(path))
        self._listener.listen()
        self._waiting: socket.socket | None = None

    async def reached(self) -> None:
        """Returns when a runner stands before it."""
        self._waiting, _ = await asyncio.get_running_loop().sock_accept(self._listener)

    def open(self) -> None:
        """Lets the runner go on."""
        assert self._waiting is not None
        self._waiting.close()

    def close(self) -> None:
        """Lets everybody go on, now and later."""
        self._listener.close()
        if self._waiting is not None:
            self._waiting.close()


def stand_before(gate: str) -> None:
    """Blocks until the gate is opened."""
    with socket.socket(socket.AF_UNIX) as there:
        there.connect(gate)
        there.recv(1)


class ScriptedRunner:
    """Does what a tick says: ``"word argument"``; see the methods ``do_<word>``."""

    def __init__(self, progress: Callable[[str], None]) -> None:
        self.info = PipelineInfo(pipeline_class="Scripted")
        self.log: list[str] = []
        self._progress = progress

    def execute(self, output: SchedulerOutput) -> RunnerOutput:
        self.log.append(f"tick {output.tick}")
        word, _, argument = (output.batch_key or "").partition(" ")
        reports = [RequestReport(run_id=run) for run in output.run_ids]
        getattr(self, f"do_{word}")(argument, reports) if word else None
        for report, new in zip(reports, output.scheduled_new_reqs, strict=False):
            report.output = new.request.params.get("image")
        return RunnerOutput(tick=output.tick, reports=reports)

    def do_hold(self, gate: str, reports: list[RequestReport]) -> None:
        """Stands before a :class:`Gate`."""
        stand_before(gate)

    def do_warm(self, gate: str, reports: list[RequestReport]) -> None:
        """The same, and says that it warms up."""
        self._progress("warming up")
        stand_before(gate)

    def do_hang(self, gate: str, reports: list[RequestReport]) -> None:
        """The same, deaf to SIGTERM."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        stand_before(gate)

    def do_raise(self, text: str, reports: list[RequestReport]) -> None:
        raise RuntimeError(text)

    def do_exit(self, code: str, reports: list[RequestReport]) -> None:
        print("about to leave", file=sys.stderr, flush=True)
        os._exit(int(code))

    def do_unfit(self, run_id: str, reports: list[RequestReport]) -> None:
        """Gives that request an output that cannot travel."""
        for report in reports:
            report.output = print if report.run_id == run_id else "fit"

    def do_large(self, nbytes: str, reports: list[RequestReport]) -> None:
        """Gives each request an output of so many bytes."""
        for report in reports:
            report.output = bytes(int(nbytes))

    def call(self, method: str, args: Any, kwargs: Any) -> Any:
        self.log.append(f"call {method}")
        return getattr(self, f"rpc_{method}")(*args, **kwargs)

    def rpc_ping(self) -> str:
        return "pong"

    def rpc_hold(self, gate: str) -> None:
        stand_before(gate)

    def rpc_warm(self, gate: str) -> None:
        """The same, and says that it warms up."""
        self._progress("warming up")
        stand_before(gate)

    def rpc_pid(self) -> int:
        return os.getpid()

    def rpc_log(self) -> list[str]:
        return self.log

    def rpc_echo(self, *args: Any, **kwargs: Any) -> Any:
        return args, kwargs

    def rpc_boom(self) -> None:
        raise ZeroDivisionError("as asked")

    def rpc_function(self) -> Any:
        return print

    def rpc_large(self, nbytes: int, parts: int = 1) -> list[bytes]:
        return [bytes(nbytes) for _ in range(parts)]

    def rpc_child(self) -> int:
        """Starts a process of its own."""
        return subprocess.Popen([sys.executable, "-c", "import threading; threading.Event().wait()"]).pid

    def rpc_modules(self) -> list[str]:
        return sorted(sys.modules)

    def rpc_threads(self) -> list[str]:
        return [thread.name for thread in threading.enumerate()]

    def rpc_sleep(self, level: int) -> None:
        self.log.append(f"sleep {level}")

    def rpc_wake_up(self) -> None:
        self.log.append("wake_up")

    def close(self) -> None:
        self.log.append("close")


def make(config: EngineConfig, progress: Callable[[str], None]) -> ScriptedRunner:
    """Loads nothing; ``model="broken"`` fails, ``model="slow:PATH"`` stands before a gate."""
    progress(f"loading {config.model}")
    if config.model == "broken":
        raise OSError("no such weights")
    if config.model.startswith("slow:"):
        stand_before(config.model.removeprefix("slow:"))
    return ScriptedRunner(progress)
