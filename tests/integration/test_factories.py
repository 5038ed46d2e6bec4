"""What a factory is called with, and what it may not give."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import tiny

from steploom import ConfigError, EngineConfig
from steploom.worker.models import loading


def required(anything):
    return _made(anything)


def by_name(*, anything):
    return _made(anything)


def optional(config=None):
    return _made(config)


def second(size=3, *, config=None):
    assert size == 3
    return _made(config)


def annotated(settings: EngineConfig | None = None, /):
    return _made(settings)


def evaluated(size=3, settings=None):
    assert size == 3
    return _made(settings)


evaluated.__annotations__ = {"size": int, "settings": EngineConfig | None}  # as in a module without the import above


def evaluated_class(settings=None):
    return _made(settings)


evaluated_class.__annotations__ = {"settings": EngineConfig}


def of_its_own(config="own.json", **other):
    assert (config, other) == ("own.json", {})
    return tiny.sd3()


def of_another_kind(config: dict[str, Any] | None = None):
    assert config is None
    return tiny.sd3()


def behind(size=3, config=None, /):
    assert (size, config) == (3, None)
    return tiny.sd3()


def _made(config: EngineConfig) -> Any:
    assert config.max_batch == 3
    return tiny.sd3()


def load(factory: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(sys.modules, "own_models", types.SimpleNamespace(make=factory))
    return loading.load(EngineConfig(model="own_models:make", device="cpu", max_batch=3), lambda line: None)


@pytest.mark.parametrize(
    "factory",
    [required, by_name, optional, second, annotated, evaluated, evaluated_class, of_its_own, of_another_kind, behind],
)
def test_the_settings_go_to_the_argument_that_is_meant_for_them(factory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(load(factory, monkeypatch)).__name__ == "StableDiffusion3Pipeline"


def test_one_that_asks_for_more_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="asks for config and size; a factory takes nothing, or the EngineConfig"):
        load(lambda config, *, size: tiny.sd3(), monkeypatch)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: diffusers.StableDiffusion3Pipeline, r"gave the class diffusers\..*, which is no diffusers pipeline;"),
        (
            lambda: diffusers.StableDiffusionXLAutoBlocks().init_pipeline(),
            "gave .*XLModularPipeline, which belongs to a modular pipeline, and those are not served; return a Diff",
        ),
    ],
)
def test_what_is_no_pipeline_is_named(made: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=words):
        load(made, monkeypatch)
