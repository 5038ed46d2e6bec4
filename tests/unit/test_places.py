"""Homes that nobody has: ``~name`` of no user, and a process without any."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from steploom import config
from steploom.cli import main
from steploom.config import EngineConfig
from steploom.engine.checks.pictures import load_pictures
from steploom.engine.costs_file import CostsFile
from steploom.errors import ConfigError, InvalidRequest
from steploom.protocol import PipelineInfo
from steploom.requests import DiffusionRequest
from steploom.server.videos.store import folder_for
from steploom.worker.models import compile_cache, sources


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process's user is in no list of users, and nobody has said where its home is."""
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000_000)


@pytest.mark.parametrize("field", ["model", "base_model", "components['vae']"])
def test_a_model_in_nobodys_home_is_told_by_its_setting(field: str) -> None:
    with pytest.raises(ConfigError) as told:
        sources.find("~nosuchuser/x", field)
    mend = "nobody knows the home '~nosuchuser'; give the path without ~"
    assert str(told.value) == f"{field}='~nosuchuser/x': {mend}"


@pytest.mark.parametrize(
    ("argv", "code", "setting"),
    [
        (["--model", "~nosuchuser/x"], 2, "--model: '~nosuchuser/x'"),
        (["--image", "~nosuchuser/in.png"], 1, "--image='~nosuchuser/in.png'"),
    ],
)
def test_the_command_line_says_it_in_one_line(argv: list[str], code: int, setting: str, capsys: Any) -> None:
    try:
        ended = main.main(["generate", "a", *argv])
    except SystemExit as refused:
        ended = refused.code
    (line,) = capsys.readouterr().err.splitlines()
    assert ended == code
    assert f"{setting}: nobody knows the home '~nosuchuser'; give the path without ~" in line


async def test_a_picture_in_nobodys_home_is_told_by_its_argument() -> None:
    for name in ("image", "mask_image"):
        request = DiffusionRequest("a", **{name: [Path("~nosuchuser/in.png")]})
        with pytest.raises(InvalidRequest) as told:
            await load_pictures(request, PipelineInfo(pipeline_class="Any"), 4096)
        mend = "nobody knows the home '~nosuchuser'; give the path without ~"
        assert str(told.value) == f"{name}='~nosuchuser/in.png': {mend}"
        assert told.value.field == name


def test_a_model_that_a_variable_names_is_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("STEPLOOM_MODEL", "~nosuchuser/x")
    assert main.main(["generate", "a"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "model='~nosuchuser/x': nobody knows the home" in line


@pytest.mark.usefixtures("homeless")
def test_without_a_home_nothing_is_kept_and_the_engine_starts(caplog: Any) -> None:
    settings = EngineConfig(distributed_executor_backend="mp")
    CostsFile.check(settings)
    assert CostsFile.of(settings, PipelineInfo(pipeline_class="Pipeline")) is None
    assert "costs of ticks are not kept: XDG_STATE_HOME='~/.local/state': nobody knows the home '~'; set" in caplog.text
    assert compile_cache.prepare(1000) is None
    assert "compiled code is kept for this start only: XDG_CACHE_HOME='~/.cache': nobody" in caplog.text
    with pytest.raises(ConfigError, match=r"^video_dir: .*; set HOME, or give an absolute path, or give the folder"):
        folder_for("owner/wan")


def test_a_home_that_there_is_is_found(tmp_path: Path) -> None:
    assert config.expanded("~/x", "model") == Path.home() / "x"
    assert config.expanded(tmp_path, "model") == tmp_path
    assert config.expanded("a~b/~c", "model") == Path("a~b/~c")
