"""DiffusionRequest: each field of ours is checked when the request is made, and a refusal names the field."""

from __future__ import annotations

import dataclasses
import decimal
import math
import pathlib
from fractions import Fraction
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from fakes import fake_engine
from hypothesis import given
from hypothesis import strategies as st

from steploom import ConfigError, DiffusionRequest, InvalidRequest, codec, lora
from steploom.media.pictures import brief
from steploom.protocol import NewRequest
from steploom.requests import OWN_FIELDS

WRONG = [
    ("timeout", "5", "a number of seconds, or None"),
    ("timeout", decimal.Decimal("5"), "a number of seconds, or None"),
    ("timeout", True, "a number of seconds, or None"),
    ("timeout", math.nan, "greater than 0 seconds"),
    ("timeout", 0, "greater than 0 seconds"),
    ("timeout", 10**400, "must fit 64 bits"),
    ("deadline", "x", "a number of seconds, or None"),
    ("deadline", math.nan, "greater than 0 seconds"),
    ("deadline", -0.5, "greater than 0 seconds"),
    ("request_id", 5, "must be a str"),
    ("request_id", b"x", "must be a str"),
    ("request_id", "", "must not be empty"),
    ("request_id", "a#1", "nor hold '#'"),
    ("preview_every", "x", "an integer: every so many steps, 0 is never"),
    ("preview_every", None, "an integer: every so many steps"),
    ("preview_every", -1, "0 (never) or more"),
    ("latents_every", 1.0, "an integer: every so many steps"),
    ("latents_every", True, "an integer: every so many steps"),
    ("draft_every", False, "an integer: every so many steps, 0 is never"),
    ("draft_every", -2, "0 (never) or more"),
    ("priority", "high", "an integer; lower runs first"),
    ("priority", None, "an integer; lower runs first"),
    ("priority", 2**80, "must fit 64 bits"),
    ("user", 7, "a str, or None"),
    ("output_type", None, "'pil', 'np', 'pt' or 'latent'"),
    ("task", 3, "a str, or None"),
    ("lora", 3, "the name of an adapter, or None"),
    ("noise_scheduler", 3, "a class name, {'class': name, **config}, or None"),
    ("cache", 3, "'easycache', 'easycache:0.1' (name:threshold)"),
    ("cache", True, "'easycache', 'easycache:0.1' (name:threshold)"),
    ("cache", "", "there are 'easycache' and 'off'"),
    ("cache", "easy", "did you mean 'easycache'?"),
    ("cache", "magcache:0.1", "did you mean 'easycache'?"),
    ("cache", "easycache:", "the threshold '' is no number"),
    ("cache", "easycache:-0.1", "the threshold '-0.1' is no number of at least 0"),
    ("cache", "easycache:nan", "the threshold 'nan'"),
    ("cache", {}, "there is no step cache None"),
    ("cache", {"name": "easycache", "treshold": 0.1}, "no setting 'treshold'; did you mean threshold?"),
    ("cache", {"name": "easycache", "threshold": math.inf}, "threshold=inf is no finite number"),
    ("cache", {"name": "easycache", "threshold": "0.1"}, "threshold='0.1' is no finite number"),
    ("cache", {"name": "easycache", "warm_up": 1.5}, "warm_up=1.5 is no share of the steps"),
    ("return_trajectory", "yes", "True or False"),
    ("seed", 1.5, "an integer, or None"),
    ("seed", False, "an integer, or None"),
    ("seed", 2**64, "must fit 64 bits"),
    ("cache", {"name": "easycache", "threshold": 10**400}, "is no finite number"),
    ("cache", {"name": "easycache", "threshold": Fraction(1, 9)}, "is no finite number"),
]


@pytest.mark.parametrize(("name", "value", "meaning"), WRONG)
def test_a_wrong_value_is_refused_with_field_value_and_mend(name: str, value: Any, meaning: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        DiffusionRequest("a cat", **{name: value})
    assert caught.value.field == name
    assert str(caught.value).startswith(f"{name}={brief(value)}: must ")
    assert meaning in str(caught.value)


async def test_the_engine_refuses_them_before_anything_is_queued() -> None:
    async with fake_engine() as (engine, executor):
        for name, value, _ in WRONG:
            with pytest.raises(InvalidRequest, match=f"^{name}="):
                await engine.generate("a cat", **{name: value})
        assert not executor.log
        assert (await engine.generate("a dog", timeout=60, deadline=0.5, priority=-1, user="me")).images == ["a dog"]


def test_every_field_of_ours_has_a_wrong_value_here() -> None:
    assert {name for name, _, _ in WRONG} == set(OWN_FIELDS)


@pytest.mark.parametrize("name", ["user", "task", "request_id", "output_type", "lora", "noise_scheduler", "cache"])
def test_half_a_character_is_refused_in_every_text_of_ours(name: str) -> None:
    with pytest.raises(InvalidRequest, match=name) as caught:
        DiffusionRequest("a cat", **{name: "easycache\ud800"})
    assert caught.value.field == name


def test_numpys_scalars_are_pythons_numbers() -> None:
    request = DiffusionRequest(
        np.str_("a cat"), priority=np.int64(2), timeout=np.float32(2.5), preview_every=np.array(3), width=np.int64(32),
        return_trajectory=np.bool_(True), guidance_scale=np.float16(3.5), image=np.zeros(1), latents=torch.tensor(1.0),
    )  # fmt: skip
    ours = (request.prompt, request.priority, request.timeout, request.preview_every, request.return_trajectory)
    theirs = (request.params["width"], request.params["guidance_scale"])
    assert [*map(type, ours), *map(type, theirs)] == [str, int, float, int, bool, int, float]
    assert (ours, theirs) == (("a cat", 2, 2.5, 3, True), (32, 3.5))
    assert (type(request.params["image"]), type(request.params["latents"])) == (np.ndarray, torch.Tensor)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"shift": math.nan}, r"noise_scheduler\['shift'\]=nan: must be a finite number"),
        ({"shift": math.inf}, r"'shift'\]=inf"),
        ({"beta_end": np.float32("nan")}, r"'beta_end'\]=nan"),
        ({"trained_betas": [0.1, math.nan]}, r"'trained_betas'\]=\[0.1, nan\]: holds nan"),
        ({"shift": 10**400}, r"'shift'\]=10+\.\.\.: must be a finite number"),
        ({"lambda_min_clipped": math.inf}, r"'lambda_min_clipped'\]=inf"),
    ],
)
def test_settings_of_a_noise_scheduler_are_finite(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequest, match=said) as caught:
        DiffusionRequest("a cat", noise_scheduler={"class": "FlowMatchEulerDiscreteScheduler", **settings})
    assert caught.value.field == "noise_scheduler"


def test_a_noise_scheduler_of_diffusers_may_have_its_infinite_default() -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler()
    assert scheduler.config["lambda_min_clipped"] == -math.inf
    assert DiffusionRequest("a cat", noise_scheduler=scheduler).noise_scheduler["lambda_min_clipped"] == -math.inf


def test_places_of_adapters_are_checked_by_name(tmp_path: pathlib.Path) -> None:
    lora.check_places({"here": str(tmp_path), "hub": "owner/name", "file of the hub": "owner/name/x.safetensors"})
    for where in (str(tmp_path / "gone"), "nowhere", "./owner/name", "owner/x.safetensors", "a" * 10**5):
        with pytest.raises(ConfigError, match=r"^loras\['ink'\]=.*: is no file or folder here, nor a hub id") as caught:
            lora.check_places({"here": str(tmp_path), "ink": where})
        assert len(str(caught.value)) < 300


PAIR = ("ink", 0.5)


@pytest.mark.parametrize(
    ("given_as", "adapters"),
    [
        (None, ()),
        ([], ()),
        ("ink", (("ink", 1.0),)),
        (pathlib.Path("dir/ink"), (("dir/ink", 1.0),)),
        (PAIR, (PAIR,)),
        ([PAIR], (PAIR,)),
        (["ink", ("oil", 2)], (("ink", 1.0), ("oil", 2.0))),
        ((("ink", 0.5), ("oil", -1)), (PAIR, ("oil", -1.0))),
        ([["ink", 0.5]], (PAIR,)),
        ([(pathlib.Path("ink"), 0.5)], (PAIR,)),
        ({"ink": 0.5, "oil": 1}, (PAIR, ("oil", 1.0))),
    ],
)
def test_adapters_are_given_in_many_ways(given_as: Any, adapters: Any) -> None:
    request = DiffusionRequest("a cat", lora=given_as, seed=1)
    assert request.adapters == adapters
    travelled = codec.decode(codec.encode(NewRequest("r#1", request)), NewRequest).request
    assert travelled.adapters == adapters


@pytest.mark.parametrize(
    ("given_as", "words"),
    [
        ("", "must not be empty"),
        ([("", 1.0)], "is no .name or path, scale."),
        ([3], "3 is no .name or path, scale."),
        ([("ink", 1.0, 2)], "is no .name or path, scale."),
        ([("ink", "1.0")], "the scale of 'ink' must be a finite number"),
        ([("ink", True)], "the scale of 'ink' must be a finite number"),
        ([("ink", float("nan"))], "the scale of 'ink' must be a finite number"),
        ([("ink", float("inf"))], "the scale of 'ink' must be a finite number"),
        ([("ink", 10**400)], "the scale of 'ink' must be a finite number"),
        (["ink", ("ink", 0.5)], "'ink' is listed twice; give it one scale"),
        ([f"ink{i}" for i in range(17)], "17 adapters, at most 16 in one request"),
    ],
)
def test_adapters_that_cannot_be_meant_are_refused(given_as: Any, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        DiffusionRequest("a cat", lora=given_as)
    assert caught.value.field == "lora"
    assert str(caught.value).startswith("lora")


def test_names_of_adapters_are_looked_up_before_any_work(tmp_path: pathlib.Path) -> None:
    named = {"watercolor": "/there/w.safetensors"}
    (tmp_path / "ink.safetensors").touch()
    assert lora.find("watercolor", named) == "/there/w.safetensors"
    assert lora.find(str(tmp_path / "ink.safetensors"), named) == str(tmp_path / "ink.safetensors")
    assert lora.find("someone/their-lora", named) == "someone/their-lora"
    assert lora.find("someone/their-lora/file.safetensors", named) == "someone/their-lora/file.safetensors"
    assert lora.find("mine", named, ["mine"]) == "mine"
    for missing in (f"{tmp_path}/gone.safetensors", "./gone", "styles/gone.safetensors", "gone", "\0", "x" * 9999):
        with pytest.raises(InvalidRequest, match=r"neither a name of EngineConfig\.loras, nor a file"):
            lora.find(missing, named)
    with pytest.raises(InvalidRequest, match="did you mean 'watercolor'"):
        lora.find("watercolour", named)


async def test_the_engine_looks_them_up() -> None:
    async with fake_engine(loras={"ink": "/there/ink.safetensors"}) as (engine, executor):
        for name in ("inc", "/nowhere/at/all"):
            with pytest.raises(InvalidRequest, match=r"^lora="):
                await engine.generate("a cat", lora=[(name, 0.5)])
        assert not executor.log
        assert (await engine.generate("a dog", lora=[("ink", 0.5)])).images == ["a dog"]


@given(
    name=st.sampled_from(OWN_FIELDS),
    value=st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.just([]),
)
def test_any_value_is_kept_or_refused_by_name(name: str, value: Any) -> None:
    refused = None
    try:
        request = DiffusionRequest("a cat", **{name: value})
    except InvalidRequest as error:
        refused = error.field
    if refused is not None:
        assert refused == name
    else:
        assert getattr(request, name) == value or (value is None and name in ("request_id", "seed"))


def test_a_seed_may_be_numpys() -> None:
    seed = DiffusionRequest("a", seed=np.int64(3)).seed
    assert (seed, type(seed)) == (3, int)


def test_a_copy_with_other_fields_keeps_the_arguments_of_the_pipeline() -> None:
    one = DiffusionRequest("a cat", seed=1, height=32, guidance_scale=2.0)
    other = dataclasses.replace(one, priority=-1, request_id="other")
    assert (other.prompt, other.seed, dict(other.params)) == ("a cat", 1, dict(one.params))
    assert (other.priority, other.request_id) == (-1, "other")
