"""``steploom doctor``: it tells the truth of this version, of this installation, and of the settings in force."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import subprocess
import sys
import tomllib

import pytest

from steploom.cli import checks, doctor, main
from steploom.config import EngineConfig
from steploom.errors import SteploomError
from steploom.executor import InprocExecutor
from steploom.protocol import Parameter, PipelineInfo

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def clean(monkeypatch) -> None:
    for name in os.environ:
        if name.startswith("STEPLOOM_"):
            monkeypatch.delenv(name)


def report(capsys) -> dict[str, str]:
    """The report's lines by what they are about, after their sign."""
    lines = capsys.readouterr().out.splitlines()
    return {line[2:24].strip(): line[0] + line[24:] for line in lines if line[:2] in ("✓ ", "- ", "✗ ")}


def test_a_healthy_machine(capsys) -> None:
    assert main.main(["doctor", "--no-run"]) == 0
    found = report(capsys)
    for name in ("torch", "diffusers", "built-in model", "executor mp", "cpu", "setting model", "setting device"):
        assert name in found
    assert not any(line.startswith("✗") for line in found.values())


def test_it_knows_every_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {*doctor.EXTRAS, "all"} == set(project["optional-dependencies"])


def test_an_executor_that_needs_what_is_not_installed(monkeypatch, capsys) -> None:
    monkeypatch.setenv("STEPLOOM_DISTRIBUTED_EXECUTOR_BACKEND", "ray")
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main.main(["doctor"]) == 1
    assert "pip install 'steploom[ray]'" in report(capsys)["setting executor"]


def test_what_is_missing_or_too_old_is_named_with_the_mend(monkeypatch, capsys) -> None:
    versions = {"greenlet": "1.0.0"}
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "msgspec":
            raise importlib.metadata.PackageNotFoundError(name)
        return versions.get(name) or real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert main.main(["doctor", "--no-run"]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("✗")]
    assert [line.split()[1] for line in lines] == ["greenlet", "msgspec"]
    assert "pip install 'greenlet>=" in lines[0]
    assert "not installed; pip install 'msgspec>=" in lines[1]


@pytest.mark.parametrize("name", ["torch", "diffusers", "transformers", "pyzmq"])
def test_what_is_installed_but_does_not_import_is_broken(name: str, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, doctor.MODULES.get(name, name), None)
    assert main.main(["doctor", "--no-run"]) == 1
    line = report(capsys)[name]
    assert line.startswith("✗")
    assert "is installed but does not import (ModuleNotFoundError: import of" in line
    assert f"pip install --force-reinstall '{name}>=" in line


def test_a_damaged_torch_is_a_finding_in_a_process_of_its_own(tmp_path: pathlib.Path) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.12: cannot open shared object file')")
    done = subprocess.run(
        [sys.executable, "-m", "steploom.cli.main", "doctor"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("✗ torch")]
    assert "(OSError: libcudart.so.12: cannot open shared object file)" in line


@pytest.mark.parametrize(
    ("field", "value", "name", "words"),
    [
        ("max_batch", "many", "settings", "STEPLOOM_MAX_BATCH='many'"),
        ("torch_threads", "0", "settings", "torch_threads=0: must be an integer of at least 1"),
        ("device", "cuda:99", "setting device", "torch sees"),
        ("device", "bogus", "setting device", "STEPLOOM_DEVICE"),
        ("device", "meta", "setting device", "STEPLOOM_DEVICE"),
        ("model", "/nope", "setting model", "model='/nope': no model_index.json"),
        ("task", "bogus", "setting task", "text-to-image"),
        ("distributed_executor_backend", "bogus", "setting executor", "give 'mp', 'inproc'"),
        ("data_parallel_size", "0", "settings", "data_parallel_size=0: must be an integer of at least 1"),
        ("scheduler", "bogus", "setting scheduler", "give one of step, request"),
        ("policy", "no.such", "setting policy", "give one of deadline, fcfs, srpt"),
        ("worker_extension", "no.such", "setting extension", "No module named 'no'"),
        ("cuda_graphs", "1", "settings", "cuda_graphs=True"),
    ],
)
def test_a_setting_that_cannot_be_used_is_broken(
    field: str, value: str, name: str, words: str, monkeypatch, capsys
) -> None:
    monkeypatch.setenv(f"STEPLOOM_{field.upper()}", value)
    assert main.main(["doctor"]) == 1  # nothing is drawn, since a setting is wrong
    found = report(capsys)
    assert [at for at, line in found.items() if line.startswith("✗")] == [name]
    assert words in found[name]
    assert "not tried, since a setting is wrong" in found.get("executor mp", "not tried, since a setting is wrong")


def test_settings_of_the_environment_are_shown(monkeypatch, capsys) -> None:
    monkeypatch.setenv("STEPLOOM_DISTRIBUTED_EXECUTOR_BACKEND", f"{__name__}.Own")
    monkeypatch.setenv("STEPLOOM_MODEL", "owner/name")
    assert main.main(["doctor", "--no-run"]) == 0
    found = report(capsys)
    assert found["setting executor"] == f"✓ {__name__}.Own, Own (STEPLOOM_DISTRIBUTED_EXECUTOR_BACKEND)"
    assert "hub id" in found["setting model"]


class Own(InprocExecutor):
    """What STEPLOOM_DISTRIBUTED_EXECUTOR_BACKEND may name."""


def test_each_executor_draws_under_the_settings_in_force(monkeypatch, capsys) -> None:
    monkeypatch.setenv("STEPLOOM_MAX_BATCH", "3")
    monkeypatch.setenv("STEPLOOM_DISTRIBUTED_EXECUTOR_BACKEND", f"{__name__}.Own")
    drawn: list[EngineConfig] = []

    async def draw(config: EngineConfig) -> list[str]:
        drawn.append(config)
        if config.distributed_executor_backend == "mp":
            raise SteploomError("no such\nluck")
        if config.distributed_executor_backend == "inproc":
            raise ZeroDivisionError("oh")
        return ["image"]

    monkeypatch.setattr(checks, "_draw", draw)
    assert main.main(["doctor"]) == 1
    found = report(capsys)
    assert [config.distributed_executor_backend for config in drawn] == ["mp", "inproc", f"{__name__}.Own"]
    assert {config.max_batch for config in drawn} == {3}
    assert found["executor mp"] == "✗ a worker process: no such luck"
    assert found["executor inproc"] == "✗ a thread: ZeroDivisionError: oh"
    own = next(line for name, line in found.items() if name.startswith("executor test_cli"))
    assert own.startswith("✓")
    assert "demo also needs image: see `steploom verify`" in own


def test_a_model_of_ones_own_is_drawn_small() -> None:
    parameters = [Parameter(name, required=False) for name in ("prompt", "num_inference_steps", "width", "height")]
    info = PipelineInfo(pipeline_class="P", parameters=parameters, default_steps=50, default_size=(1024, 1024))
    config = EngineConfig(model="owner/name", max_steps=1)
    asked = checks._parameters(info, config)
    assert (asked["num_inference_steps"], asked["width"], asked["height"]) == (1, 256, 256)
    assert set(checks._parameters(info, EngineConfig())) == {"prompt", "num_inference_steps"}


def test_it_asks_for_every_dependency_that_this_platform_needs() -> None:
    names = {finding.name for finding in doctor.packages_found()}
    assert {"torch", "diffusers", "greenlet", "msgspec", "pyzmq", "anyio"} <= names
    assert not names & {"starlette", "ray", "av", "opentelemetry-api"}, "extras are not essential"
