"""The decoder of the wire under atheris, for a hundred thousand mutations; ``nox -s fuzz`` does a million and more."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="atheris has wheels for Linux")
def test_damaged_messages_are_errors_and_nothing_else(tmp_path: Path) -> None:
    script = Path(__file__).with_name("decoder.py")
    command = [sys.executable, str(script), "--runs", "100000", "--corpus", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "number_of_executed_units: 100000" in done.stderr
