"""DiffusionRequest: each field of ours is checked when the request is made, and a refusal names the field."""

from __future__ import annotations

import decimal
import math
from typing import Any

import pytest
from fakes import fake_engine
from hypothesis import given
from hypothesis import strategies as st

from steploom import DiffusionRequest, InvalidRequest
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
    ("return_trajectory", "yes", "True or False"),
    ("seed", 1.5, "an integer, or None"),
    ("seed", False, "an integer, or None"),
    ("seed", 2**64, "must fit 64 bits"),
]


@pytest.mark.parametrize(("name", "value", "meaning"), WRONG)
def test_a_wrong_value_is_refused_with_field_value_and_mend(name: str, value: Any, meaning: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        DiffusionRequest("a cat", **{name: value})
    assert caught.value.field == name
    assert str(caught.value).startswith(f"{name}={value!r}: must ")
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
