"""Ctrl-C while modules are still being imported: one line and 130, whatever is being imported."""

from __future__ import annotations

import asyncio
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

IMPORTING = """
import signal, sys

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            sys.meta_path.remove(self)
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
sys.argv = ["steploom", "generate", "a cat", "--backend", "inproc"]
from steploom.cli.main import main
sys.exit(main())
"""


@pytest.mark.parametrize(
    "name",
    ["argparse", "steploom.errors", "steploom.cli.arguments", "steploom.cli.doctor", "msgspec", "PIL.Image", "anyio",
     "uvloop", "rich.progress", "steploom.engine.core", "zmq"],
)  # fmt: skip
def test_ctrl_c_during_an_import(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTING.format(name=name)],
        cwd=tmp_path, capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (130, "steploom: interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_text_is_executed_as_dataclasses_do(tmp_path: Path) -> None:
    """Python would end by SIGINT after its last line: see ``_interrupt_is_handled``."""
    (tmp_path / "rich.py").write_text("exec('import signal; signal.raise_signal(signal.SIGINT)')\n")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "steploom", "generate", "a cat"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=99, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (130, "steploom: interrupted\n")


def test_ctrl_c_before_the_loop_runs_leaves_no_coroutine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python would warn that it was never awaited: a second line."""
    from steploom.cli import loop

    async def main() -> None: ...

    def interrupt() -> asyncio.AbstractEventLoop:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_FACTORY", interrupt)
    coroutine = main()
    with pytest.raises(KeyboardInterrupt):
        loop.run(coroutine)
    assert inspect.getcoroutinestate(coroutine) == inspect.CORO_CLOSED


def test_the_module_of_the_command_imports_nothing_that_takes_time() -> None:
    code = """
import sys, steploom
before = set(sys.modules)
import steploom.cli.main
print(*sorted(set(sys.modules) - before))
"""
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert loaded == ["steploom.cli", "steploom.cli.main"]
