"""What a request may say about its step cache (``cache=``), and what it means. Plain data, no torch."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from typing import Any, cast

from steploom.errors import InvalidRequest
from steploom.given import is_number
from steploom.media.pictures import brief

OFF = "off"
THRESHOLDS = {"easycache": 0.05}
"""Step caches by name, and the threshold of each where none is given."""

WARM_UP = 0.15
"""The share of its steps that a request computes before any may be skipped, where it does not say."""

MEANING = "'easycache', 'easycache:0.1' (name:threshold), {'name': ..., 'threshold': ..., 'warm_up': ...}, or 'off'"
"""What ``cache=`` is, for messages."""

_THRESHOLD = r"([0-9]{1,9}(\.[0-9]{0,12})?|\.[0-9]{1,12})(e-?[0-9]{1,2})?"
PATTERN = rf"{OFF}|({'|'.join(THRESHOLDS)})(:{_THRESHOLD})?"
"""What a ``cache`` that is a str matches as a whole, as a regular expression of JSON Schema."""


@dataclasses.dataclass(frozen=True)
class StepCaching:
    """How a request skips steps.

    Attributes:
        name: The rule by which it decides.
        threshold: The change of the denoiser's output, as a share of that output, which skipped steps may add up to;
            always greater than 0.
        warm_up: The share of its steps, 0 to 1, that are computed first; two are always.
    """

    name: str
    threshold: float
    warm_up: float = WARM_UP


def plain(cache: Any) -> Any:
    """``cache`` without what only says the same in other types: a :class:`StepCaching`, another kind of mapping."""
    if isinstance(cache, StepCaching):
        return dataclasses.asdict(cache)
    return dict(cast("Mapping[Any, Any]", cache)) if isinstance(cache, Mapping) else cache


def parse(cache: Any) -> StepCaching | None:
    """How a request skips steps that gives ``cache``; None if it skips none, as with a threshold of 0.

    Raises:
        InvalidRequest: It names what is wrong, and what would do.
    """
    if cache is None or cache == OFF:
        return None
    if isinstance(cache, Mapping):
        return _from_mapping(cast("Mapping[Any, Any]", cache))
    if not isinstance(cache, str):
        raise _wrong(cache, "None skips no step")
    name, colon, number = cache.partition(":")
    name = _known(cache, name)
    if colon and re.fullmatch(_THRESHOLD, number) is None:
        raise _wrong(cache, f"the threshold {brief(number)} is no number of at least 0")
    return _made(cache, name, float(number) if colon else THRESHOLDS[name], WARM_UP)


def _from_mapping(cache: Mapping[Any, Any]) -> StepCaching | None:
    known = [field.name for field in dataclasses.fields(StepCaching)]
    for key in cache:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5) or known
            raise _wrong(cache, f"there is no setting {brief(key)}; did you mean {' or '.join(nearest)}?")
    if cache.get("name") == OFF:
        return None
    name = _known(cache, cache.get("name"))
    given = {key: value for key, value in cache.items() if value is not None}
    return _made(cache, name, given.get("threshold", THRESHOLDS[name]), given.get("warm_up", WARM_UP))


def _known(cache: Any, name: Any) -> str:
    if isinstance(name, str) and name in THRESHOLDS:
        return name
    known = (*THRESHOLDS, OFF)
    nearest = difflib.get_close_matches(str(name).lower(), known, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"there are {' and '.join(map(repr, known))}"
    raise _wrong(cache, f"there is no step cache {brief(name)}; {hint}")


def _made(cache: Any, name: str, threshold: Any, warm_up: Any) -> StepCaching | None:
    if not is_number(threshold) or threshold < 0:
        raise _wrong(cache, f"threshold={brief(threshold)} is no finite number of at least 0")
    if not is_number(warm_up) or not 0 <= warm_up <= 1:
        raise _wrong(cache, f"warm_up={brief(warm_up)} is no share of the steps, from 0 to 1")
    return StepCaching(name, float(threshold), float(warm_up)) if threshold > 0 else None


def _wrong(cache: Any, what: str) -> InvalidRequest:
    return InvalidRequest(f"cache={brief(cache)}: must be {MEANING}; {what}", field="cache")
