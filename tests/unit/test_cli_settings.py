"""Settings of ``steploom serve``: command line over environment over file over defaults, for every option."""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import tomllib
from typing import Any

import pytest

from steploom.cli import arguments, main
from steploom.cli.option import FILE, PREFIX, Layers, Option
from steploom.cli.serving import serve, settings

EXAMPLES: dict[str, tuple[str, str, str]] = {
    "model": ("demo", "owner/one", "owner/two"),
    "dtype": ("float32", "bfloat16", "float16"),
    "lora_model": ("a=./a", "b=./b", "c=./c"),
    "root_path": ("/a", "/b", "/c"),
    "log_format": ("text", "json", "text"),
}
"""Three values of options that do not take any number."""


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    for name in os.environ:
        if name.startswith(PREFIX):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def read(*words: str, env: dict[str, str] | None = None, file: str | None = None) -> argparse.Namespace:
    options = [*words]
    if file is not None:
        pathlib.Path("serve.toml").write_text(file)
        options += ["--config", "serve.toml"]
    found = main.build_parser().parse_args(["serve", *options])
    settings.complete(found, env or {})
    return found


def layers() -> Layers:
    return main.build_parser().parse_args(["serve"]).layers


def toml(option: Option, text: str) -> str:
    if option.kind == "flag":
        return text
    if option.kind == "list":
        return f'["{text}"]'
    return text if isinstance(option.read(text), (int, float)) else f'"{text}"'


@pytest.mark.parametrize("name", [name for name in layers().options if name not in (FILE, "engine")])
def test_each_option_can_be_set_in_each_way_and_the_stronger_one_counts(name: str) -> None:
    option = layers().options[name]
    first, second, third = EXAMPLES.get(name, ("660", "600", "640"))
    word, variable = option.action.option_strings[-1], option.variables[0]
    if option.kind == "flag":
        assert getattr(read(word, env={variable: "0"}), name) is True
        assert getattr(read(env={variable: "false"}, file=f"{name} = true"), name) is False
        assert getattr(read(file=f"{name} = true"), name) is True
        assert getattr(read(env={variable: "yes"}), name) is True
    else:
        file = f"{name} = {toml(option, third)}"
        for found, value, source in (
            (read(word, first, env={variable: second}, file=file), first, "command line"),
            (read(env={variable: second}, file=file), second, "environment"),
            (read(file=file), third, "file"),
        ):
            wanted = option.read(value)
            assert getattr(found, name) == ([wanted] if option.kind == "list" else wanted)
            assert found.sources[name] == source
    assert read().sources[name] == "default"
    assert getattr(read(), name) == option.default


def test_an_option_that_does_not_exist_yet_is_a_setting_too() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config")
    parser.add_argument("--log-format", choices=("text", "json"), default="text", help="how (default: %(default)s)")
    parser.add_argument("--colours", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--sizes", nargs="+", type=int, default=[1])
    settings.layer(parser)
    assert "(default: text)" in parser.format_help()
    pathlib.Path("a.toml").write_text('colours = false\nsizes = [3, 4]\nlog-format = "json"')
    for words, env, wanted in (
        ([], {}, ("text", True, [1])),
        (["--config", "a.toml"], {"STEPLOOM_SIZES": "5, 6"}, ("json", False, [5, 6])),
        ([], {"STEPLOOM_COLOURS": "off", "STEPLOOM_CONFIG": "a.toml"}, ("json", False, [3, 4])),
        (["--no-colours", "--sizes", "2"], {"STEPLOOM_COLOURS": "on"}, ("text", False, [2])),
    ):
        found = parser.parse_args(words)
        settings.complete(found, env)
        assert (found.log_format, found.colours, found.sizes) == wanted


def test_names_and_tables_of_the_file() -> None:
    file = 'max-batch = 3\napi_key = "one"\n[lora_model]\nink = "./ink"\n[engine]\nvae_tiling = true\nmax_frames = 7'
    found = read(file=file)
    assert (found.max_batch, found.api_key, found.lora_model) == (3, ["one"], [("ink", "./ink")])
    config = serve.engine_config(found)
    assert (config.vae_tiling, config.max_frames, config.loras) == (True, 7, {"ink": "./ink"})


def test_a_field_of_the_engine_has_one_value_however_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    def waiting(*words: str, file: str, **env: str) -> int:
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        return serve.engine_config(read(*words, env=env, file=file)).max_waiting

    file = "[engine]\nmax_waiting = 5"
    assert waiting(file=file) == 5
    assert waiting(file=file, STEPLOOM_MAX_WAITING="6") == 6
    assert waiting(file="max_queue = 5", STEPLOOM_MAX_WAITING="6") == 6
    assert waiting("--engine", "max_waiting=7", file=file, STEPLOOM_MAX_QUEUE="6") == 7
    assert waiting("--max-queue", "8", file=file, STEPLOOM_MAX_QUEUE="6") == 8
    monkeypatch.setenv("STEPLOOM_COMPILE", "0")
    assert not serve.engine_config(read(env=dict(os.environ), file="[engine]\ncompile = true")).compile


@pytest.mark.parametrize(
    ("option", "field", "given"),
    [("--max-queue-seconds", "max_waiting_s", "30"), ("--variant", "variant", "fp16"), ("--revision", "revision", "v")],
)
def test_none_is_a_value_that_counts_more_than_a_weaker_one(
    option: str, field: str, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def value(*words: str, file: str = "") -> Any:
        return getattr(serve.engine_config(read(*words, env=dict(os.environ), file=file)), field)

    name = option[2:].replace("-", "_")
    text = given if given.isdecimal() else f'"{given}"'
    for file in (f"{name} = {text}", f"[engine]\n{field} = {text}"):
        assert value(file=file) is not None
        assert value(option, "none", file=file) is None
    monkeypatch.setenv(f"{PREFIX}{field.upper()}", given)
    assert value() is not None
    assert value(option, "none") is None
    monkeypatch.setenv(f"{PREFIX}{field.upper()}", "none")
    assert value() is None
    assert value(file=f"{name} = {text}") is None
    monkeypatch.delenv(f"{PREFIX}{field.upper()}")
    assert value(file=f'{name} = "none"') is None


def test_a_number_of_the_engine_may_be_none_in_each_way(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve.engine_config(read("--engine", "memory_share=none")).memory_share is None
    file = '[engine]\nmemory_share = "none"\ncosts_file = "none"'
    config = serve.engine_config(read(file=file))
    assert (config.memory_share, config.costs_file) == (None, None)
    monkeypatch.setenv("STEPLOOM_MEMORY_SHARE", "none")
    pathlib.Path("shown.toml").write_text(shown(capsys, "--engine", "costs_file=none"))
    monkeypatch.delenv("STEPLOOM_MEMORY_SHARE")
    assert serve.engine_config(read("--config", "shown.toml")) == config, "what is shown says the same"
    assert read("--timeout", "none", file="timeout = 30").timeout is None
    for words, said in (
        (["--timeout", "soon"], "argument --timeout: 'soon': must be a finite number, for example 4.0, or none"),
        (["--engine", "memory_share=a"], "memory_share='a': must be a share greater than 0 and at most 1 or None"),
    ):
        with contextlib.suppress(SystemExit):
            assert main.main(["config", "show", *words]) != 0
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("max_bach = 3", "serve.toml: max_bach: there is no such setting; did you mean max_batch"),
        ('max_batch = "eight"', "serve.toml: max_batch = 'eight': must be an integer of at least 1"),
        ('max_batch = "8"', "must be a number: write 8 without quotes"),
        ("max_batch = 8.5", "must be an integer"),
        ("max_batch = [8]", "must be one value, not an array"),
        ("max_batch = true", "must be a string or a number"),
        ("host = 3", "host = 3: must be a string, in quotes"),
        ("keep_abandoned = 1", "must be true or false, without quotes"),
        ("keep_abandoned = 'true'", "must be true or false, without quotes"),
        ("port = 70000", "port = 70000: must be an integer between 0 and 65535"),
        ('dtype = "float8"', "must be one of auto, float32"),
        ("[engine]\nport = 1", "port is no field of EngineConfig; write it above the line [engine]"),
        ("[engine]\nvae_tilling = true", "vae_tiling"),
        ("[engine]\nmax_frames = 2026-01-01", "must not be a date"),
        ("max_frames = 3", "write it below a line [engine]"),
        ("max_waiting = 3", "did you mean max_queue?"),
        ("served = 'demo'", "did you mean model?"),
        ("config = 'b.toml'", "cannot name another one"),
        ("max-batch = 3\nmax_batch = 3", "is there twice"),
        ("[host]\na = 1", "must not be a table"),
        ("[lora_model]\nink = 1", "ink = 1: must be a string, in quotes"),
        ("a = [", "is no TOML"),
    ],
)
def test_what_is_wrong_in_the_file_is_named(file: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    pathlib.Path("serve.toml").write_text(file)
    with pytest.raises(SystemExit) as ended:
        main.main(["serve", "--config", "serve.toml"])
    said = capsys.readouterr().err
    assert (ended.value.code, said.count("\n")) == (2, 1)
    assert words in said


def test_what_is_wrong_in_the_environment_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: Any, caplog: Any
) -> None:
    monkeypatch.setenv("STEPLOOM_CONFIG", "nowhere.toml")
    with pytest.raises(SystemExit):
        main.main(["config", "show"])
    assert "nowhere.toml: cannot be read: No such file" in capsys.readouterr().err
    monkeypatch.setenv("STEPLOOM_CONFIG", "")
    monkeypatch.setenv("STEPLOOM_MAX_BATCHH", "secret")
    assert main.main(["config", "show"]) == 0
    (record,) = caplog.records
    assert (
        "STEPLOOM_MAX_BATCHH: there is no such setting, it has no effect; did you mean STEPLOOM_MAX_BATCH?"
        in record.message
    )
    monkeypatch.setenv("STEPLOOM_PORT", "x")
    with pytest.raises(SystemExit):
        main.main(["config", "show"])
    assert "STEPLOOM_PORT='x': must be an integer between 0 and 65535" in capsys.readouterr().err


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main.main(["config", "show", *words]) == 0
    return capsys.readouterr().out


def test_what_is_shown_is_a_file_that_says_the_same(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("STEPLOOM_MAX_STEPS", "77")
    monkeypatch.setenv("STEPLOOM_VAE_SLICING", "1")
    words = ("--port", "9", "--cors-origin", 'https://a"b', "--lora-model", "a b=./x", "--engine", "vae_tiling=true",
             "--keep-abandoned", "--timeout", "2.5", "--api-key", "hidden")  # fmt: skip
    first = shown(capsys, *words)
    assert "hidden" not in first
    for entry, source in (("port = 9", "from the command line"), ("max_steps = 77", "from the environment"),
                          ("max_batch = 32", "default"), ("vae_slicing = true", "from the environment"),
                          ('api_key = ["********"]', "from the command line")):  # fmt: skip
        (found,) = [line for line in first.splitlines() if line.startswith(f"{entry} ")]
        assert found.endswith(f"# {source}")
    for name in ("STEPLOOM_MAX_STEPS", "STEPLOOM_VAE_SLICING"):
        monkeypatch.delenv(name)
    pathlib.Path("shown.toml").write_text(first)
    second = shown(capsys, "--config", "shown.toml")
    assert tomllib.loads(first) == tomllib.loads(second)
    assert "port = 9 " in second
    assert "# from the file" in second
    with pytest.raises(Exception, match="a key that was not shown"):
        serve.run(read("--config", "shown.toml"))


def test_all_keys_count(tmp_path: pathlib.Path) -> None:
    (tmp_path / "keys").write_text("# ours\n a \n\nb\n")
    assert serve._keys(read("--api-key-file", "keys", env={"STEPLOOM_API_KEY": "c,d"})) == ("c", "d", "a", "b")
    assert serve._keys(read("--api-key", "e", env={"STEPLOOM_API_KEY": "c"})) == ("e",)


def test_no_time_to_drain_is_a_time() -> None:
    assert read("--drain-timeout", "0").drain_timeout == 0
    assert read(env={"STEPLOOM_DRAIN_TIMEOUT": "0"}).drain_timeout == 0
    for wrong in ("-1", "nan", "soon"):
        with pytest.raises(SystemExit):
            read("--drain-timeout", wrong)


def test_the_model_is_given_once() -> None:
    assert read("owner/a", env={"STEPLOOM_MODEL": "owner/b"}).model == "owner/a"
    with pytest.raises(Exception, match="leave one out"):
        read("owner/a", "--model", "owner/b")


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main.main(["config", "--help"])
    text = capsys.readouterr().out
    example = text.partition("a file:")[2].partition("STEPLOOM_CONFIG")[0]
    pathlib.Path("example.toml").write_text(example.replace('"./my-sd3"', '"demo"'))
    assert main.main(["config", "show", "--config", "example.toml"]) == 0
    with pytest.raises(SystemExit):
        main.main(["serve", "--help"])
    assert "SUPPRESS" not in capsys.readouterr().out
    assert arguments.EXIT_USAGE == main.EXIT_USAGE
