"""Fixtures of the tests that start real processes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from mortal_site import Site
from processes import content
from scripted_runner import Gate


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for sockets, where nothing may be left. (``tmp_path`` is made first: it is not to be made in here.)"""
    with tempfile.TemporaryDirectory(prefix="s", dir="/tmp") as folder:  # a socket's path has to be short
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    """What a scripted worker waits at."""
    gate = Gate(tmp_path / "gate")
    yield gate
    gate.close()


@pytest.fixture
def site(tmp_path: Path, temporary: Path) -> Iterator[Site]:
    """Engines over workers that die as they are told; neither they nor their workers may leave a file."""
    yield Site(tmp_path)
    assert content(temporary) == []
