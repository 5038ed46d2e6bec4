"""EngineConfig: every value is checked when the settings are made, and a refusal names field, value and mend."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steploom import ConfigError, EngineConfig
from steploom.cli import arguments, main
from steploom.engine.checks.validation import make_config
from steploom.server import ServerSettings
from steploom.worker.messages import Configure

FIELDS = {field.name: field for field in dataclasses.fields(EngineConfig)}
INTEGERS = [name for name, field in FIELDS.items() if str(field.type).startswith("int")]
TEXTS = [name for name, field in FIELDS.items() if str(field.type).startswith("str")]
OPERATIONS = pathlib.Path(__file__).parents[2] / "docs" / "operations.md"
FLAGS = [name for name, field in FIELDS.items() if field.type == "bool"]


@pytest.mark.parametrize(
    ("name", "value", "mend"),
    [
        ("max_batch", "8", "an integer of at least 1 or one of 'auto'; the default is 16"),
        ("max_batch", 2.5, "an integer of at least 1"),
        ("max_batch", True, "an integer of at least 1"),
        ("max_batch", None, "an integer of at least 1"),
        ("max_batch", 0, "an integer of at least 1"),
        ("max_batch", 2**64, "below 2[*][*]63"),
        ("max_retries", -1, "an integer of at least 0; the default is 2"),
        ("max_retries", None, "an integer of at least 0"),
        ("max_steps", None, "an integer of at least 1"),
        ("max_resident", 0, "an integer of at least 1 or None"),
        ("torch_threads", 0, "an integer of at least 1 or None; the default is None"),
        ("torch_threads", False, "an integer of at least 1 or None"),
        ("start_timeout_s", "600", "a number of seconds greater than 0"),
        ("start_timeout_s", math.nan, "a number of seconds greater than 0"),
        ("start_timeout_s", 10**400, "a number of seconds greater than 0"),
        ("memory_share", 1.1, "a share greater than 0 and at most 1 or None; the default is 0.9"),
        ("memory_share", 0, "a share greater than 0 and at most 1"),
        ("memory_share", math.nan, "a share greater than 0 and at most 1"),
        ("memory_share", True, "a share greater than 0 and at most 1"),
        ("tick_timeout_s", None, "a number of seconds greater than 0"),
        ("tick_timeout_s", True, "a number of seconds greater than 0"),
        ("tick_timeout_s", 0, "a number of seconds greater than 0"),
        ("model", 3, "a str that is not empty; the default is 'demo'"),
        ("model", None, "a str that is not empty"),
        ("model", "", "a str that is not empty"),
        ("task", 3, "a str that is not empty or None"),
        ("device", 0, "a str that is not empty; the default is 'auto'"),
        ("compile", "false", "True or False; the default is False"),
        ("cuda_graphs", 1, "True or False"),
        ("batch_invariant", None, "True or False"),
        ("dtype", "int8", "one of 'auto', 'float32', 'bfloat16', 'float16'"),
        ("dtype", [], "one of 'auto'"),
        ("encode_cache_bytes", -1, "an integer of at least 0"),
        ("components", "vae", "a mapping by name or None"),
        ("group_offload", "leaf", "one of 'leaf_level', 'block_level' or a mapping by name or None"),
        ("quantization_config", "int8", "a mapping by name or a quantization config of diffusers or None"),
        ("vae_tiling", "yes", "True or False"),
        ("revision", 1, "a str that is not empty or None"),
        ("scheduler", object(), "a str that is not empty or a class"),
        ("policy", 5, "a str that is not empty or a class; the default is 'deadline'"),
        ("loras", "ink.safetensors", "a mapping of names to files, folders or hub ids or None"),
        ("loras", {"ink": 3}, "a mapping of names"),
        ("loras", {"": "x"}, "a mapping of names"),
        ("cache", 0.1, "a str that is not empty or None"),
        ("cache", "teacache", "did you mean 'easycache'"),
        ("max_loras", 0, "an integer of at least 1; the default is 8"),
        ("distributed_executor_backend", None, "a str that is not empty or a class; the default is 'mp'"),
    ],
)
def test_a_wrong_value_is_refused_with_field_value_and_mend(name: str, value: Any, mend: str) -> None:
    with pytest.raises(ConfigError, match=mend) as caught:
        EngineConfig(**{name: value})
    assert str(caught.value).startswith(f"{name}={value!r}: must be ")


@given(
    name=st.sampled_from(list(FIELDS)),
    value=st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | st.just([])
    | st.just(int),
)
def test_any_value_is_kept_or_refused_and_what_is_kept_is_of_its_type(name: str, value: Any) -> None:
    refusal = None
    try:
        config = EngineConfig(**{name: value})
    except ConfigError as error:
        refusal = str(error)
    if refusal is not None:
        assert refusal.startswith(f"{name}={value!r}: must be ")
        return
    if value is None:
        assert "None" in str(FIELDS[name].type)
    elif name in INTEGERS:
        assert type(value) is int
    elif name in FLAGS:
        assert type(value) is bool
    else:
        assert isinstance(value, (str, type) if name in TEXTS or name == "dtype" else (int, float))
    if not isinstance(value, type):
        assert Configure.of(config).restore() == config


@pytest.mark.parametrize("name", [name for name in FIELDS if name.endswith(("_timeout_s", "_backoff_s"))])
def test_every_timeout_is_in_the_table_of_them_with_its_default(name: str) -> None:
    lines = OPERATIONS.read_text().partition("## Every time-out")[2].splitlines()
    (line,) = [line for line in lines if line.startswith(f"| `{name}` |")]
    default = FIELDS[name].default
    assert default is None or line.split("|")[2].strip() == f"{default:g}"


def test_every_timeout_of_a_server_is_in_a_table_with_its_default() -> None:
    lines = OPERATIONS.read_text().partition("| `ServerSettings` |")[2].splitlines()[2:]
    rows = [[cell.strip() for cell in line.split("|")[1:]] for line in lines if line.startswith("|")]
    options = main.build_parser().parse_args(["serve"]).layers.options.values()
    known = {f"`{one.action.option_strings[-1]}`": one.default for one in options if one.action.metavar == "S"}
    known |= {f"`{one.name}`": one.default for one in dataclasses.fields(ServerSettings) if one.name.endswith("_s")}
    del known["`--max-queue-seconds`"]  # what waits, not for how long
    for name, default in known.items():
        (row,) = [row for row in rows if name in f"{row[0]} {row[1]}"]
        assert ("none" if default is None else f"{default:g}") in row[2].split(", "), name


def test_the_hub_has_as_long_as_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi

    from steploom.worker.lora.places import place

    waited: list[float] = []
    monkeypatch.setattr(HfApi, "model_info", lambda self, repository, timeout: waited.append(timeout))
    assert place("owner/name", 0.25, local_files_only=False) == ("owner/name", None)
    assert waited == [0.25]


def test_what_is_right_passes() -> None:
    EngineConfig(
        max_batch=1, max_resident=1, max_retries=0, torch_threads=1, start_timeout_s=1, tick_timeout_s=math.inf
    )
    EngineConfig(distributed_executor_backend=int, scheduler=int, policy=int, task="text-to-image", compile=True)
    assert all(EngineConfig(**{name: FIELDS[name].default}) == EngineConfig() for name in FIELDS)


def test_what_says_the_same_in_another_type_is_taken() -> None:
    import torch

    folder = pathlib.Path("a") / "b"
    config = EngineConfig(
        model=folder, dtype=torch.bfloat16, device=torch.device("cuda", 1), components={"vae": folder, "unet": None}
    )
    assert config == EngineConfig(
        model="a/b", dtype="bfloat16", device="cuda:1", components={"vae": "a/b", "unet": None}
    )
    assert EngineConfig(dtype={"vae": torch.float32}).dtype == {"vae": "float32"}
    assert hash(config) == hash(EngineConfig(model="a/b", device="cuda:1"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"dtype": {"vae": "auto"}}, r"dtype\['vae'\]='auto': must be one of 'float32'"),
        ({"components": {"vae": 3}}, r"components\['vae'\]=3: must be a folder, a hub id or a file"),
        ({"group_offload": "leaf_level", "compile": True}, "group_offload='leaf_level' with compile=True"),
        ({"max_batch": "auto", "batch_invariant": True}, "max_batch='auto' with batch_invariant=True.*give max_batch"),
    ],
)
def test_entries_and_what_does_not_go_together_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        EngineConfig(**given)


def test_mappings_are_read_from_variables_as_json() -> None:
    env = {
        "STEPLOOM_GROUP_OFFLOAD": "leaf_level",
        "STEPLOOM_QUANTIZATION_CONFIG": '{"quant_backend": "torchao"}',
        "STEPLOOM_COMPONENTS": '{"vae": null}',
        "STEPLOOM_DTYPE": '{"default": "float16"}',
        "STEPLOOM_VAE_TILING": "true",
    }
    config = EngineConfig.from_env(env)
    assert (config.group_offload, config.vae_tiling) == ("leaf_level", True)
    assert config.quantization_config == {"quant_backend": "torchao"}
    assert (config.components, config.dtype) == ({"vae": None}, {"default": "float16"})
    assert EngineConfig.from_env({"STEPLOOM_GROUP_OFFLOAD": '{"offload_type": "leaf_level"}'}).group_offload
    with pytest.raises(ConfigError, match="STEPLOOM_COMPONENTS='vae': must be a JSON object"):
        EngineConfig.from_env({"STEPLOOM_COMPONENTS": "vae"})


def test_max_resident_holds_a_batch() -> None:
    with pytest.raises(ConfigError, match=r"max_resident=3: must be at least max_batch=4.*raise it, or leave it None"):
        EngineConfig(max_batch=4, max_resident=3)


def test_variables_are_read_by_the_type_of_their_field() -> None:
    given = {"max_batch": "3", "compile": "yes", "tick_timeout_s": "2.5", "task": "x", "torch_threads": "2"}
    given |= {"max_resident": "9", "device": "cpu", "loras": "ink=./ink.safetensors, oil=me/oil"}
    env = {f"STEPLOOM_{name.upper()}": value for name, value in given.items()}
    expected = EngineConfig(
        max_batch=3,
        compile=True,
        tick_timeout_s=2.5,
        task="x",
        torch_threads=2,
        max_resident=9,
        device="cuda",
        loras={"ink": "./ink.safetensors", "oil": "me/oil"},
    )
    assert EngineConfig.from_env(env, device="cuda") == expected


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if "None" in str(field.type)])
def test_a_variable_can_say_none_where_there_may_be_none(name: str) -> None:
    for word in ("none", "None"):
        assert getattr(EngineConfig.from_env({f"STEPLOOM_{name.upper()}": word}), name) is None
        assert arguments.engine_setting(f"{name}={word}") == (name, None)


@pytest.mark.parametrize(
    ("variable", "raw", "words"),
    [
        (
            "STEPLOOM_MAX_BATCH",
            "many",
            "STEPLOOM_MAX_BATCH='many': must be an integer or auto; unset it for the default, 16",
        ),
        ("STEPLOOM_COMPILE", "maybe", "STEPLOOM_COMPILE='maybe': must be true or false; unset it"),
        ("STEPLOOM_TICK_TIMEOUT_S", "soon", "STEPLOOM_TICK_TIMEOUT_S='soon': must be a number"),
        ("STEPLOOM_MEMORY_SHARE", "most", "STEPLOOM_MEMORY_SHARE='most': must be a number or none; unset it"),
        ("STEPLOOM_TORCH_THREADS", "all", "STEPLOOM_TORCH_THREADS='all': must be an integer or none; unset it"),
        ("STEPLOOM_MAX_STEPS", "none", "STEPLOOM_MAX_STEPS='none': must be an integer; unset it"),
        ("STEPLOOM_TICK_TIMEOUT_S", "nan", "tick_timeout_s=nan: must be a number of seconds greater than 0"),
        ("STEPLOOM_TORCH_THREADS", "0", "torch_threads=0: must be an integer of at least 1"),
        ("STEPLOOM_LORAS", "ink", "STEPLOOM_LORAS='ink': must be name=path,name=path or none; unset it"),
        ("STEPLOOM_MODEL", "", "model='': must be a str that is not empty"),
    ],
)
def test_a_wrong_variable_is_named(variable: str, raw: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig.from_env({variable: raw})
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "mend"),
    [
        ("executor", r"did you mean distributed_executor_backend\?"),
        ("max_bach", "did you mean max_batch"),
        ("zzz", r"help\(steploom.EngineConfig\) lists them"),
    ],
)
def test_a_setting_that_there_is_not_is_told_with_the_nearest(name: str, mend: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: EngineConfig has no such field; {mend}"):
        make_config(None, {name: 1})
