"""``steploom doctor``: it tells the truth of this version, of this installation, and of the settings in force."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import shutil
import subprocess
import sys
import tomllib

import pytest

from steploom import demo
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
        [sys.executable, "-m", "steploom", "doctor"],
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
        ("device", "meta", "setting device", "nothing can be computed there"),
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


def doctor_with(folder: pathlib.Path, *options: str, **variables: str) -> tuple[int, dict[str, str], str]:
    """The exit code, the report's lines by name and all that was said, with ``folder`` first on the path."""
    path = os.pathsep.join([str(folder), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "steploom", "doctor", "--no-run", *options],
        env={**os.environ, "PYTHONPATH": path, **variables}, capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert "Traceback" not in said
    return done.returncode, {line[2:24].strip(): line for line in done.stdout.splitlines()}, said


def test_a_package_that_ends_the_process_or_is_rich_itself_is_a_finding(tmp_path: pathlib.Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch wants another CPU')")
    (tmp_path / "rich.py").write_text("raise ImportError('no rich here')")
    (tmp_path / "PIL").mkdir()
    (tmp_path / "PIL" / "__init__.py").write_text("")
    code, found, said = doctor_with(tmp_path)
    assert code == 1
    for name, why in {
        "torch": "SystemExit: torch wants another CPU",
        "rich": "ImportError: no rich here",
        "pillow": "PIL.Image",
    }.items():
        assert found[name].startswith("✗"), said
        assert why in found[name]
    assert "see the lines with ✗" in said


def test_where_the_output_has_no_signs_there_are_words(tmp_path: pathlib.Path) -> None:
    (tmp_path / "rich.py").write_text("raise ImportError('no rich here')")
    (tmp_path / "torch.py").write_text("raise OSError('no torch')")
    _, _, said = doctor_with(tmp_path, PYTHONIOENCODING="ascii")
    lines = said.splitlines()
    assert any(line.startswith("ok    steploom ") for line in lines), said
    assert any(line.startswith("wrong rich ") for line in lines), said
    assert not any(line.startswith("wrong extra") for line in lines), "only what is at fault"
    assert "?" not in said
    assert "see the lines with wrong" in said


def test_nothing_is_said_where_standard_output_is_closed(tmp_path: pathlib.Path) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('no torch')")
    done = subprocess.run(
        ["sh", "-c", f"'{sys.executable}' -m steploom.cli.main doctor --no-run >&-"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        stderr=subprocess.PIPE, text=True, timeout=110, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


def test_an_optional_part_that_does_not_import_is_broken(tmp_path: pathlib.Path, monkeypatch, capsys) -> None:
    (tmp_path / "starlette.py").write_text("raise ImportError('broken starlette')")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [
        name for name in sys.modules if name.partition(".")[0] == "starlette" or name.startswith("steploom.server")
    ]:
        monkeypatch.delitem(sys.modules, name)
    lines = {finding.name: finding for finding in doctor.extras()}
    assert lines["extra server"].state == "broken"
    assert "starlette (ImportError: broken starlette)" in lines["extra server"].detail
    assert main.main(["serve"]) == 1
    said = capsys.readouterr().err
    assert "does not import (broken starlette" in said
    assert "missing" not in said


def test_an_optional_part_that_is_not_there_is_absent(monkeypatch) -> None:
    monkeypatch.setitem(doctor.EXTRAS, "server", (("no-such-package", "no.such.module"), "x"))
    lines = {finding.name: finding for finding in doctor.extras()}
    assert lines["extra server"].state == "absent"


@pytest.mark.parametrize("damage", ["cut", "pointer", "gone", "header"])
def test_the_built_in_weights_are_looked_into(damage: str, tmp_path: pathlib.Path, monkeypatch) -> None:
    model = tmp_path / "model"
    shutil.copytree(demo.path(), model)
    monkeypatch.setattr(demo, "path", lambda: model)
    assert doctor.demo_model().state == "ok"
    file = next((model / "vae").glob("*.safetensors"))
    if damage == "cut":
        os.truncate(file, file.stat().st_size - 1)
    elif damage == "pointer":
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 5\n")
    elif damage == "header":
        file.write_bytes((2).to_bytes(8, "little") + b"[]")
    else:
        file.unlink()
    finding = doctor.demo_model()
    assert finding.state == "broken"
    assert str(model / "vae") in finding.detail
    assert "pip install --force-reinstall steploom" in finding.detail
