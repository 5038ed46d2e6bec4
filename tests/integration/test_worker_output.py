"""What a worker process prints, however much it is."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from steploom.executor import process
from steploom.executor.process import WorkerProcess

LINES = 20_000
SCRIPT = f"""#!{sys.executable}
for k in range({LINES}):
    print("line", k)
"""


async def test_others_have_their_turn_while_a_worker_prints_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a turn of the loop few lines are heard, whatever there is in the pipe; and none is lost.

    In the turn in which it is seen that the process has ended, they may be heard twice.
    """
    heard: list[int] = []
    script = tmp_path / "worker"
    script.write_text(SCRIPT)
    script.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(script))
    worker = WorkerProcess(0, "", "", lambda line: heard.append(int(line.split()[1])))
    worker.spawn()
    worker.watch(lambda: None)
    most = 0
    while not worker.exited.is_set():
        before = len(heard)
        await asyncio.sleep(0)
        most = max(most, len(heard) - before)
    assert heard == list(range(LINES))
    assert 0 < most <= 2 * (process.SOME // len("line 0\n") + 1)
