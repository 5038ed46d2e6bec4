"""The decoder of the wire under atheris, for a hundred thousand mutations; ``nox -s fuzz`` does a million and more."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from steploom import codec
from steploom.codec import reader
from steploom.codec.rules import Code

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="atheris, and limits of memory, are for Linux")


@LINUX
@pytest.mark.parametrize("greedy", [lambda: bytearray(400 << 20), lambda: torch.empty(400 << 20, dtype=torch.uint8)])
def test_a_decoder_that_asks_for_too_much_memory_is_found(
    greedy: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it asks in vain, and makes a ProtocolError of it; and though nobody touches what it has got."""
    import frames

    message = frames.joined([bytes(frame) for frame in codec.encode(frames.ToEngine(frames.messages.Returned(1, 1j)))])
    assert frames.decode(message) == "+--"
    monkeypatch.setitem(reader._READERS, Code.COMPLEX, lambda self, data: len(greedy()) and 1j)
    with pytest.raises(MemoryError, match="more than 268435456 bytes"):
        frames.decode(message)
    assert bytearray(400 << 20), "afterwards there is memory again"


@pytest.mark.slow
@LINUX
def test_damaged_messages_are_errors_and_nothing_else(tmp_path: Path) -> None:
    script = Path(__file__).with_name("decoder.py")
    command = [sys.executable, str(script), "--runs", "100000", "--corpus", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "number_of_executed_units: 100000" in done.stderr
