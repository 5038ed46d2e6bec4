"""The command line's arguments: what is read, and how it complains."""

from __future__ import annotations

import argparse
import os
import pathlib
import shlex
import subprocess
import sys

import pytest

from steploom.cli import arguments, generate, main, outputs
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
        for name in command.split():
            (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
            parser = commands.choices[name]
        text = parser.format_help()
    lines = [line.strip() for line in text.partition("examples:")[2].splitlines()]
    commands_shown = [line.partition("  ")[0].partition(" || ")[0] for line in lines if line.startswith("steploom ")]
    return [shlex.split(line)[1:] for line in commands_shown]


@pytest.mark.parametrize(
    "command",
    [None, "demo", "generate", "serve", "verify", "bench", "bench tick", "bench throughput", "bench serve", "doctor"],
)
def test_every_help_teaches_by_examples_that_parse(command: str | None, tmp_path: pathlib.Path, monkeypatch) -> None:
    for name in ("my-sd3", "my-flux", "my-model", "my-llada2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").touch()
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
        (["generate", "x", "-o", "a.psd"], 1, ["-o a.psd", "'.psd'", "use .png"]),
        (["generate", "x", "-o", "dir.png"], 1, ["-o dir.png", "is a folder", "dir.png/out.png"]),
        (["generate", "x", "-o", f"{'a' * 300}.png"], 1, ["cannot be written", "too long", "choose another"]),
        (["generate", "x", "-o", "taken.png", "-n", "2"], 1, ["-o taken-2.png", "is a folder"]),
        (["generate", "x", "-o", "taken.png", "--save-steps"], 1, ["-o taken-steps.png", "is a folder"]),
        (["generate", "x", "-o", "taken.png", "--set", "num_images_per_prompt=2"], 1, ["taken-2.png", "is a folder"]),
        (["generate", "x", "--guidance", "nan"], 2, ["--guidance", "'nan'", "finite number"]),
        (["generate", "x", "--guidance", "1e999"], 2, ["--guidance", "'1e999'", "finite number"]),
        (["generate", "x", "--guidance", "much"], 2, ["--guidance", "'much'", "for example 4.0"]),
        (["generate", "x", "--seed", str(2**64)], 1, ["seed=", "64 bits"]),
        (["generate", "x", "--seed", str(2**64 - 1), "-n", "2"], 1, ["seed=", "64 bits"]),
        (["generate", "x", "--steps", "1001"], 1, ["--steps 1001", "at most 1000", "STEPLOOM_MAX_STEPS"]),
        (["generate", "x", "--width", "9999", "--height", "9999"], 1, ["--width 9999", "STEPLOOM_MAX_PIXELS"]),
        (["generate", "x", "--set", "seed=3"], 2, ["--set", "'seed=3'", "use --seed instead"]),
        (["generate", "x", "--set", "prompt=x"], 2, ["'prompt=x'", "use PROMPT instead"]),
        (["generate", "x", "--set", "num_inference_steps=3"], 2, ["use --steps instead"]),
        (["generate", "x", "--set", "timeout=abc"], 2, ["'timeout=abc'", "the engine's", "in Python"]),
        (["generate", "x", "--set", "request_id=5"], 2, ["'request_id=5'", "the engine's"]),
        (["generate", "x", "--set", "output_type=latent"], 2, ["'output_type=latent'", "leave it out"]),
        (["generate", "x", "--set", "return_dict=false"], 2, ["'return_dict=false'", "leave it out"]),
        (["generate", "x", "--set", "generator=7"], 2, ["'generator=7'", "use --seed"]),
        (["generate", "x", "--set", "callback_on_step_end=f"], 2, ["'callback_on_step_end=f'", "from Python"]),
        (["generate", "x", "--set", "self=1"], 2, ["'self=1'", "no argument"]),
        (["generate", "x", "--set", "eta=NaN"], 2, ["'eta=NaN'", "finite"]),
        (["verify", "demo", "--set", "seed=3"], 2, ["'seed=3'", "the engine's"]),
        (["verify", "demo", "--set", "width=3"], 2, ["'width=3'", "use --size instead"]),
        (["verify", "./nowhere"], 2, ["MODEL", "'./nowhere'", "model_index.json"]),
        (["verify", "demo", "--steps", "0"], 2, ["--steps", "'0'", "at least 1"]),
        (["weave"], 2, ["'weave'", "generate"]),
        ([], 2, ["COMMAND"]),
        (["demo", "--rounds", "-1"], 2, ["--rounds", "'-1'"]),
    ],
)
def test_a_wrong_argument_is_one_line_that_names_field_value_and_mend(
    argv: list[str], code: int, words: list[str], tmp_path: pathlib.Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("dir.png", "taken-2.png", "taken-steps.png"):
        (tmp_path / folder).mkdir()
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
    assert not any(path.is_file() for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "code", "complaint"),
    [
        (KeyboardInterrupt(), 130, "steploom: interrupted\n"),
        (EngineDead("gone\n  for good"), 1, "steploom: gone for good\n"),
        (
            ImportError("no torch"),
            1,
            "steploom: no torch; `steploom doctor` says what is wrong with this installation\n",
        ),
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
        ("a=" + "[" * 100_000, ("a", "[" * 100_000)),
        ("a=" + "1" * 5000, ("a", "1" * 5000)),
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


def test_engine_takes_any_field_and_names_the_nearest() -> None:
    argv = ["generate", "x", "--engine", "vae_tiling=true", "--engine", "group_offload=leaf_level", "--variant", "fp16"]
    config = arguments.engine_config(main.build_parser().parse_args([*argv, "--offline", "--revision", "v1"]))
    assert (config.vae_tiling, config.group_offload, config.variant) == (True, "leaf_level", "fp16")
    assert (config.local_files_only, config.revision) == (True, "v1")
    options = main.build_parser().parse_args(["verify", "demo", "--engine", "max_batch=3"])
    assert arguments.engine_config(options).max_batch == 3
    with pytest.raises(argparse.ArgumentTypeError, match="did you mean vae_tiling"):
        arguments.engine_setting("vae_tilling=true")


def test_model_takes_files_factories_and_addresses(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.safetensors").touch()
    address = "https://huggingface.co/owner/name/blob/main/one.safetensors"
    for text in ("one.safetensors", "pkg.module:factory", "owner/name/one.gguf", address):
        assert arguments.model(text) == text
    with pytest.raises(argparse.ArgumentTypeError, match="no/such/folder"):
        arguments.model("no/such/folder")


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
    (tmp_path / "empty" / "modular_model_index.json").touch()
    with pytest.raises(argparse.ArgumentTypeError, match="'empty': a modular pipeline, which is not served; give a"):
        arguments.model("empty")


def test_a_model_of_the_environment_is_checked_too(monkeypatch) -> None:
    monkeypatch.setenv("STEPLOOM_MODEL", "/nowhere")
    with pytest.raises(ConfigError, match=r"model='/nowhere': no model_index\.json"):
        arguments.engine_config(main.build_parser().parse_args(["generate", "x"]))


def test_check_file_accepts_what_can_be_written(tmp_path: pathlib.Path) -> None:
    for ending in (".PNG", ".jpg", ".webp", ".gif", ".tiff", ".bmp"):
        assert outputs.check_file(tmp_path / f"a{ending}") == tmp_path / f"a{ending}"
    with pytest.raises(ConfigError, match="has no ending"):
        outputs.check_file(tmp_path / "a")
    # Pillow reads PSD, says that it saves HDF5 and cannot, and saves XBM of two colours alone.
    for ending in (".psd", ".h5", ".xbm"):
        with pytest.raises(ConfigError, match=rf"a{ending}: images cannot be saved as '{ending}'; use \.png"):
            outputs.check_file(tmp_path / f"a{ending}")


def test_a_folder_is_told_as_one(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=r"is a folder; give a file in it, such as .*out\.png"):
        outputs.check_file(tmp_path)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("generate a large red circle", "generate: 'large red circle' is too much; what has spaces needs quotes"),
        ("generate x --modle demo", "steploom generate: --modle: no such option; did you mean --model? (see"),
        ("serve --prot=80", "steploom serve: --prot: no such option; did you mean --port? (see"),
        ("generate -- -a --steps 2", "generate: --steps: after -- everything is the prompt; give options before -- "),
        ("bench tick --xyzzy", "steploom bench tick: --xyzzy: no such option (see `steploom bench tick --help`)"),
    ],
)  # fmt: skip
def test_what_a_command_does_not_know_is_told_with_what_was_meant(
    words: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main.build_parser().parse_args(words.split())
    assert left.value.code == 2
    assert told in capsys.readouterr().err


def test_check_writable_leaves_everything_as_it_was(tmp_path: pathlib.Path) -> None:
    (tmp_path / "old.png").write_bytes(b"old")
    (tmp_path / "link.png").symlink_to("elsewhere.png")
    for name in ("old.png", "new.png", "link.png"):
        outputs.check_writable(tmp_path / name)
    assert (tmp_path / "old.png").read_bytes() == b"old"
    assert (tmp_path / "link.png").is_symlink()
    assert not (tmp_path / "new.png").exists()


def test_check_writable_refuses_pipes_without_waiting_for_a_reader(tmp_path: pathlib.Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ConfigError, match="is no regular file"):
        outputs.check_writable(tmp_path / "pipe.png")
