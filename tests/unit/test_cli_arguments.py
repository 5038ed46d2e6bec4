"""The command line's arguments: what is read, and how it complains."""

from __future__ import annotations

import argparse
import pathlib
import shlex
import subprocess
import sys

import pytest

from steploom.cli import arguments, generate, main
from steploom.config import EngineConfig
from steploom.errors import ConfigError, EngineDead


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from steploom.cli import main; main.build_parser().format_help();"
        "print(*{'torch', 'diffusers', 'anyio', 'rich', 'PIL', 'zmq', 'numpy'} & set(sys.modules))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert loaded == []


def examples(command: str | None) -> list[list[str]]:
    parser = main.build_parser()
    if command is None:
        text = parser.format_help()
    else:
        (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        text = commands.choices[command].format_help()
    lines = [line.strip() for line in text.partition("examples:")[2].splitlines()]
    commands_shown = [line.partition("  ")[0].partition(" || ")[0] for line in lines if line.startswith("steploom ")]
    return [shlex.split(line)[1:] for line in commands_shown]


@pytest.mark.parametrize("command", [None, "demo", "generate", "doctor"])
def test_every_help_teaches_by_examples_that_parse(command: str | None, tmp_path: pathlib.Path, monkeypatch) -> None:
    (tmp_path / "my-sd3").mkdir()
    (tmp_path / "my-sd3" / "model_index.json").touch()
    monkeypatch.chdir(tmp_path)
    shown = examples(command)
    assert len(shown) >= 3
    for argv in shown:
        assert callable(main.build_parser().parse_args(argv).run)


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["generate", "x", "--steps", "0"], 2, ["--steps", "'0'", "at least 1"]),
        (["generate", "x", "-n", "many"], 2, ["-n", "'many'", "at least 1"]),
        (["generate", "x", "--set", "nope"], 2, ["--set", "'nope'", "KEY=VALUE"]),
        (["generate", "x", "--model", "./nowhere"], 2, ["--model", "'./nowhere'", "model_index.json"]),
        (["generate", "x", "--dtype", "int3"], 2, ["--dtype", "int3", "bfloat16"]),
        (["generate", "x", "-o", "a.xyz"], 1, ["-o", "a.xyz", ".png"]),
        (["generate", "x", "-o", "nowhere/a.png"], 1, ["-o", "'nowhere'", "create it"]),
        (["weave"], 2, ["'weave'", "generate"]),
        ([], 2, ["COMMAND"]),
        (["demo", "--rounds", "-1"], 2, ["--rounds", "'-1'"]),
    ],
)
def test_a_wrong_argument_is_one_line_that_names_field_value_and_mend(
    argv: list[str], code: int, words: list[str], tmp_path: pathlib.Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        found = main.main(argv)
    except SystemExit as stop:
        found = stop.code
    assert found == code
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1
    assert complaint.startswith("steploom")
    for word in words:
        assert word in complaint


@pytest.mark.parametrize(
    ("error", "code", "complaint"),
    [
        (KeyboardInterrupt(), 130, "steploom: interrupted\n"),
        (EngineDead("gone\n  for good"), 1, "steploom: gone for good\n"),
        (PermissionError(13, "Permission denied", "out.png"), 1, "steploom: [Errno 13] Permission denied: 'out.png'\n"),
    ],
)
def test_failures_end_with_a_line_and_a_code(
    error: BaseException, code: int, complaint: str, monkeypatch, capsys
) -> None:
    def fail(options: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr(generate, "run", fail)
    assert main.main(["generate", "x"]) == code
    assert capsys.readouterr().err == complaint


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch) -> None:
    def fail(options: argparse.Namespace) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(generate, "run", fail)
    with pytest.raises(ZeroDivisionError):
        main.main(["generate", "x"])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a=3", ("a", 3)),
        ("a=0.5", ("a", 0.5)),
        ("a=true", ("a", True)),
        ("a=[1, 2]", ("a", [1, 2])),
        ("a=plain text", ("a", "plain text")),
        ("a=b=c", ("a", "b=c")),
        ("a=", ("a", "")),
    ],
)
def test_set_reads_json_and_else_text(text: str, value: tuple[str, object]) -> None:
    assert arguments.setting(text) == value


def test_options_win_over_the_environment_and_that_over_defaults(monkeypatch) -> None:
    monkeypatch.setenv("STEPLOOM_DEVICE", "cuda:7")
    monkeypatch.setenv("STEPLOOM_MAX_BATCH", "3")
    options = main.build_parser().parse_args(["generate", "x", "--device", "cpu", "--backend", "inproc"])
    config = arguments.engine_config(options)
    assert (config.device, config.max_batch, config.distributed_executor_backend) == ("cpu", 3, "inproc")
    assert config.model == EngineConfig().model


def test_model_takes_hub_ids_and_folders(tmp_path: pathlib.Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "model_index.json").touch()
    assert arguments.model("owner/name") == "owner/name"
    assert arguments.model("demo") == "demo"
    assert arguments.model("real") == "real"
    (tmp_path / "empty").mkdir()
    with pytest.raises(argparse.ArgumentTypeError, match=r"'empty': no model_index\.json"):
        arguments.model("empty")


def test_check_image_file_accepts_what_can_be_written(tmp_path: pathlib.Path) -> None:
    assert arguments.check_image_file(tmp_path / "a.PNG") == tmp_path / "a.PNG"
    with pytest.raises(ConfigError, match="no ending"):
        arguments.check_image_file(tmp_path / "a")
