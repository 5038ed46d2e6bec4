"""Compiled code on disk: where, and how much of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from torch._inductor.runtime.runtime_utils import default_cache_dir

from steploom import config
from steploom.worker.models import compile_cache

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def file(folder: Path, name: str, size: int, age: int) -> Path:
    made = folder / name
    made.parent.mkdir(parents=True, exist_ok=True)
    made.write_bytes(b"x" * size)
    os.utime(made, (10_000 - age, 10_000 - age))
    return made


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    oldest, older, newest = (file(tmp_path, f"a{age}/{age}.so", 100, age) for age in (300, 200, 100))
    assert compile_cache.trim(tmp_path, 300) == 300
    assert oldest.exists()
    assert compile_cache.trim(tmp_path, 290) == 200
    assert (oldest.exists(), older.exists(), newest.exists()) == (False, True, True)
    assert compile_cache.trim(tmp_path, 100) == 0
    assert compile_cache.trim(tmp_path / "nowhere", 100) == 0


def test_it_is_in_the_users_cache_folder_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.delenv(VARIABLE)
    old = file(tmp_path, "steploom/compile/x/1.so", 1000, 100)
    folder = compile_cache.prepare(500)
    assert folder == tmp_path / "steploom" / "compile"
    assert os.environ[VARIABLE] == str(folder)
    assert not old.exists()
    assert compile_cache.prepare(500) == folder, "the next engine of this process"
    monkeypatch.setenv(VARIABLE, default_cache_dir())
    assert compile_cache.prepare(500) == folder, "torch has put its own folder there, when it was imported"


def test_a_place_of_the_users_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    own = file(tmp_path, "own/1.so", 1000, 100)
    monkeypatch.setenv(VARIABLE, str(own.parent))
    assert compile_cache.prepare(1) is None
    assert own.exists()
    assert os.environ[VARIABLE] == str(own.parent)


def test_none_is_kept_where_it_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(file(tmp_path, "a-file", 1, 0)))
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.delenv(VARIABLE)
    assert compile_cache.prepare(100) is None
    assert compile_cache.prepare(0) is None
    assert VARIABLE not in os.environ


def test_folders_are_the_users() -> None:
    assert config.cache_folder({"XDG_CACHE_HOME": "/c"}) == Path("/c/steploom")
    assert config.cache_folder({"XDG_CACHE_HOME": "relative"}) == Path.home() / ".cache" / "steploom"
    assert config.cache_folder({}) == Path.home() / ".cache" / "steploom"
