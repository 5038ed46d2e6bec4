"""What ``docs/deploy`` and its page hold is what this version takes: the unit, the Dockerfile, the settings."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig

import pytest

from steploom.cli import main
from steploom.cli.serving import settings

ROOT = pathlib.Path(__file__).parents[2]
UNIT = ROOT / "docs" / "deploy" / "steploom.service"
DOCKERFILE = ROOT / "docs" / "deploy" / "Dockerfile"
PAGE = (ROOT / "docs" / "deploy.md").read_text()
MORE_THAN_DRAINING_S = 10
"""What the page says that SIGKILL should wait beyond --drain-timeout."""


def unit(name: str) -> list[str]:
    return re.findall(rf"^{name}=(.*)$", UNIT.read_text(), re.M)


def test_the_unit_starts_the_server_and_gives_it_time() -> None:
    (command,) = unit("ExecStart")
    program, *words = shlex.split(command)
    assert pathlib.PurePath(program).name == "steploom"
    options = main.build_parser().parse_args(words)
    assert options.command == "serve"
    assert float(unit("TimeoutStopSec")[0]) >= options.drain_timeout + MORE_THAN_DRAINING_S
    assert unit("KillMode") == ["mixed"]  # the worker must not get the signal
    assert unit("Type") == ["exec"]  # nobody notifies systemd


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd here")
def test_systemd_understands_the_unit(tmp_path: pathlib.Path) -> None:
    here = tmp_path / "steploom.service"
    here.write_text(UNIT.read_text().replace("/opt/steploom/bin/steploom", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", str(here)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"\\\n", " ", DOCKERFILE.read_text())
    return [(line.split()[0], line.partition(" ")[2]) for line in text.splitlines() if line and line[0] != "#"]


def environment(folder: pathlib.Path) -> dict[str, str]:
    """The image's, with its places inside of ``folder``."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("STEPLOOM_", "PYTHON", "VIRTUAL"))}
    for word, rest in instructions():
        for name, value in re.findall(r"(\w+)=(\S+)", rest) if word == "ENV" else []:
            known = re.sub(r"\$(\w+)", lambda found: env[found[1]], value)
            env[name] = re.sub(r"^(/opt|/data)", rf"{folder}\1", known)
    return env


def test_the_dockerfile_says_what_a_container_needs() -> None:
    said = dict(instructions())
    assert re.fullmatch(r"python:3\.\d+-slim", said["FROM"])
    assert said["USER"] not in ("root", "0")
    assert said["STOPSIGNAL"] == "SIGTERM"
    assert "/ready" in said["HEALTHCHECK"]
    program, *words = [*json.loads(said["ENTRYPOINT"]), *json.loads(said["CMD"])]
    options = main.build_parser().parse_args(words)
    settings.complete(options, environment(pathlib.Path("/x")))
    assert (program, options.host, options.port) == ("steploom", "0.0.0.0", int(said["EXPOSE"]))
    stop = re.search(r"docker stop -t (\d+)", PAGE)
    assert stop is not None
    assert int(stop[1]) >= options.drain_timeout + MORE_THAN_DRAINING_S


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_dockerfile_builds_what_serves_and_is_healthy(tmp_path: pathlib.Path) -> None:
    """Its commands, in a folder and a virtual environment of their own; that has this one's packages, not steploom."""
    env, source = environment(tmp_path), tmp_path / "src"
    source.mkdir()
    env |= {"STEPLOOM_HOST": "127.0.0.1", "STEPLOOM_PORT": "0", "STEPLOOM_TORCH_THREADS": "1"}
    for word, rest in instructions():
        if word == "COPY":
            *names, place = rest.split()
            for name in names:
                _copy(ROOT / name, source / place if place != "./" else source / name)
        elif word == "RUN" and not rest.startswith("useradd"):
            command = rest.replace("python3", sys.executable, 1) if rest.startswith("python3") else rest
            subprocess.run(["/bin/sh", "-c", command], cwd=source, env=env, check=True, timeout=600)
            if "-m venv" in rest:
                _lend_packages(pathlib.Path(env["VENV"]))
    said = dict(instructions())
    command = [*json.loads(said["ENTRYPOINT"]), *json.loads(said["CMD"])]
    command[0] = str(pathlib.Path(env["VENV"]) / "bin" / command[0])
    with subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            ready = next(line for line in process.stderr if "is ready at" in line)
            check = json.loads(said["HEALTHCHECK"].partition("CMD ")[2])
            env["STEPLOOM_PORT"] = ready.rpartition(":")[2].strip()
            assert subprocess.run([sys.executable, *check[1:]], env=env, check=False, timeout=30).returncode == 0
            process.send_signal(getattr(signal, said["STOPSIGNAL"]))
            assert process.wait(60) == 0
            assert (
                subprocess.run([sys.executable, *check[1:]], env=env, capture_output=True, check=False).returncode != 0
            )
        finally:
            process.kill()


def _copy(given: pathlib.Path, to: pathlib.Path) -> None:
    if given.is_dir():
        shutil.copytree(given, to, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(given, to)


def _lend_packages(venv: pathlib.Path) -> None:
    """What is installed here counts as installed there, so that gigabytes are not fetched; all but steploom itself."""
    lent = venv.parent / "lent"
    lent.mkdir()
    for entry in pathlib.Path(sysconfig.get_paths()["purelib"]).iterdir():
        if "steploom" not in entry.name and entry.name != "__pycache__" and entry.suffix != ".pth":
            (lent / entry.name).symlink_to(entry)
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "lent.pth").write_text(str(lent))


def test_the_page_knows_the_settings(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = main.build_parser().parse_args(["serve"]).layers.options
    words = {word for option in options.values() for word in option.action.option_strings}
    others = {"--gpus", "--rm", "--help", "--save"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", PAGE)) - others <= words
    variables = {variable for option in options.values() for variable in option.variables}
    assert set(re.findall(r"STEPLOOM_[A-Z_]+[A-Z]", PAGE)) <= variables | {
        "STEPLOOM_VAE_TILING",
        "STEPLOOM_MEMORY_SHARE",
    }
    (example,) = re.findall(r"```toml\n(.*?)```", PAGE, re.S)
    (tmp_path / "serve.toml").write_text(example.replace('"./my-sd3"', '"demo"'))
    monkeypatch.chdir(tmp_path)
    assert main.main(["config", "show", "--config", "serve.toml"]) == 0
