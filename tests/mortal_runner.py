"""A runner whose requests are sums that no two share, and whose worker does what they ask for: die, stand still, lie.

Named to worker processes as ``mortal_runner:make``. No torch: it loads in no time. Its model is a file, with a line for
each load: ``ok``, ``fail``, ``die``, ``other`` (another model) or ``gate PATH``; after the last one all is ``ok``.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripted_runner import stand_before

from steploom import codec
from steploom.config import EngineConfig
from steploom.protocol import (
    ErrorInfo,
    PipelineInfo,
    RequestReport,
    RunnerOutput,
    SchedulerOutput,
    WorkerStats,
    request_id_of,
)
from steploom.requests import DiffusionRequest
from steploom.worker.messages import Answer, Fatal, Ticked, ToEngine


class Sum:
    """A program: each step adds a number that its seed has drawn."""

    def __init__(self, request: DiffusionRequest) -> None:
        self.params = request.params
        self.numbers = random.Random(f"{request.prompt} {request.seed}")
        self.total = digest(self.params.get("buffers", 0))
        self.step = 0

    def advance(self) -> None:
        self.step += 1
        if self.step == self.params.get("at", 1):
            for word in ("kill", "stop", "gate", "corrupt", "wrong", "boom", "empty", "both", "settings", "fatal"):
                if word in self.params:
                    getattr(self, f"do_{word}")(self.params[word])
        self.total = self.total * 31 + self.numbers.randrange(2**32)

    def do_kill(self, when: str | bool) -> None:
        """Each time, or only while there is such a file."""
        if when is True or Path(str(when)).exists():
            os.kill(os.getpid(), signal.SIGKILL)

    def do_stop(self, once: str) -> None:
        """The process stands still, the first time."""
        if first(once):
            os.kill(os.getpid(), signal.SIGSTOP)

    def do_gate(self, path: str) -> None:
        with contextlib.suppress(OSError):  # it was closed
            stand_before(path)

    def do_corrupt(self, once: str) -> None:
        """What this worker says next is nonsense, the first time."""
        if first(once):
            codec.encode = lambda *args, **kwargs: [b"\xc1 nonsense"]

    def do_wrong(self, once: str) -> None:
        """It answers another tick than it was told."""
        if first(once):
            encode = codec.encode

            def shifted(message: Any, **kwargs: Any) -> Any:
                with contextlib.suppress(AttributeError):
                    message.answer.output.tick += 7
                return encode(message, **kwargs)

            codec.encode = shifted

    def do_empty(self, once: str) -> None:
        """It answers its tick with nothing."""
        says(once, lambda tick: Ticked(tick.tick))

    def do_both(self, once: str) -> None:
        """It answers its tick with an output, and with an error."""
        says(once, lambda tick: Ticked(tick.tick, tick.output, ErrorInfo("RuntimeError", "odd")))

    def do_settings(self, once: str) -> None:
        """It finds fault with the settings, in a tick."""
        says(once, lambda tick: Ticked(tick.tick, None, ErrorInfo("ConfigError", "odd settings")))

    def do_fatal(self, once: str) -> None:
        """The same, of itself."""
        says(once, lambda tick: Fatal(ErrorInfo("ConfigError", "odd settings")))

    def do_boom(self, once: str) -> None:
        """The runner itself fails, and not the request."""
        if first(once):
            raise RuntimeError("the runner is broken")


def says(once: str, what: Callable[[Ticked], Answer]) -> None:
    """In the place of its next answer to a tick this worker says something else, the first time."""
    if not first(once):
        return
    encode = codec.encode

    def other(message: Any, **kwargs: Any) -> Any:
        if isinstance(getattr(message, "answer", None), Ticked):
            codec.encode = encode
            message = ToEngine(what(message.answer))
        return encode(message, **kwargs)

    codec.encode = other


def digest(value: Any) -> int:
    """A number that says what is in lists, dicts, arrays, pictures and bytes; of a number itself."""
    if isinstance(value, (int, float)):
        return int(value)
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return sum(31**place * digest(item) for place, item in enumerate(value))
    return zlib.crc32(value if isinstance(value, bytes) else value.tobytes())


def first(once: str) -> bool:
    """Whether nobody has asked before, in whatever process."""
    try:
        Path(once).open("x").close()
    except FileExistsError:
        return False
    return True


class MortalRunner:
    """Executes ticks of such requests."""

    def __init__(self, info: PipelineInfo) -> None:
        self.info = info
        self.sums: dict[str, Sum] = {}
        self.asleep: int | None = None
        self.device = ""

    def execute(self, output: SchedulerOutput) -> RunnerOutput:
        for run in output.finished_req_ids:
            self.sums.pop(run, None)
        for new in output.scheduled_new_reqs:
            self.sums[new.run_id] = Sum(new.request)
        here = [run for run in output.run_ids if run in self.sums]
        return RunnerOutput(tick=output.tick, reports=[self._step(run, len(here)) for run in here])

    def _step(self, run: str, mates: int) -> RequestReport:
        one = self.sums[run]
        one.advance()
        total = one.params.get("num_inference_steps", 4)
        report = RequestReport(
            run_id=run, phase="denoise", stepped=True, step=one.step, total_steps=total, batch_key="sums",
            batch_requests=mates, rows=1, finished=one.step == total,
        )  # fmt: skip
        if report.finished:
            del self.sums[run]
            report.output = one.total
        return report

    def call(self, method: str, args: Any, kwargs: Any) -> Any:
        return getattr(self, f"rpc_{method}")(*args, **kwargs)

    def rpc_ping(self) -> str:
        return "pong"

    def rpc_pid(self) -> int:
        return os.getpid()

    def rpc_device(self) -> str:
        return self.device

    def rpc_stats(self) -> WorkerStats:
        return WorkerStats()

    def rpc_wait(self, gate: str) -> None:
        stand_before(gate)

    def rpc_sleep(self, level: int) -> None:
        """Level 9 is so deep that the process stands still."""
        if level == 9:
            os.kill(os.getpid(), signal.SIGSTOP)
        self.asleep = level

    def rpc_wake_up(self) -> None:
        self.asleep = None

    def rpc_held(self) -> dict[str, int]:
        """The steps of the programs that it holds."""
        return {request_id_of(run): one.step for run, one in self.sums.items()}

    def rpc_asleep(self) -> int | None:
        return self.asleep

    def close(self) -> None:
        pass


def make(config: EngineConfig, progress: Callable[[str], None]) -> MortalRunner:
    """Loads as its file says."""
    log = Path(f"{config.model}.log")
    with log.open("a") as loads:
        loads.write(f"{os.getpid()}\n")
    plan = Path(config.model).read_text().splitlines()
    number = log.read_text().splitlines().index(str(os.getpid()))  # others may have begun to load since
    word, _, argument = [*plan, *["ok"] * 1000][number].partition(" ")
    if word == "fail":
        raise OSError("no such weights")
    if word == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "gate":
        with contextlib.suppress(OSError):
            stand_before(argument)
    room = os.getpid() << 20  # what there is for requests differs from start to start
    runner = MortalRunner(PipelineInfo(pipeline_class="Other" if word == "other" else "Sums", room_bytes=room))
    runner.device = config.device
    return runner
