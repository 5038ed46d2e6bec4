"""How fast videos and sound run, as a caller or a pipeline says: checked before anything is written."""

from __future__ import annotations

import math
from typing import Any

from steploom.errors import ConfigError

DEFAULT_FRAME_RATE = 16.0
"""Frames per second where neither the caller nor the pipeline names a rate: Wan's."""

SLOWEST, FASTEST = 0.02, 1000
"""Frames per second. An animated PNG shows a frame for 65 seconds at most; animations count in milliseconds."""

_FINEST = 1_000_000
"""Samples per second: beyond all formats."""


def frame_rate(given: Any, own: Any) -> float:
    """Frames per second: as given, else the output's own, else :data:`DEFAULT_FRAME_RATE`.

    Raises:
        ConfigError: No video can run like that.
    """
    rate = given if given is not None else own if own is not None else DEFAULT_FRAME_RATE
    value = _number(rate)
    if not SLOWEST <= value <= FASTEST:  # nor if it is NaN
        raise ConfigError(
            f"frame_rate={rate!r}: must be frames per second, from {SLOWEST} to {FASTEST}; give save() another"
            + (", or None for the pipeline's" if given is not None else "")
        )
    return value


def sampling_rate(given: Any, own: Any) -> int | None:
    """Samples per second: as given, else the output's own; None where nobody says.

    Raises:
        ConfigError: No sound can run like that.
    """
    rate = given if given is not None else own
    if rate is None:
        return None
    value = _number(rate)
    if not (1 <= value <= _FINEST and value.is_integer()):
        raise ConfigError(
            f"sampling_rate={rate!r}: must be a whole number of samples per second, from 1 to {_FINEST}; give save() "
            "another" + (", or None for the model's" if given is not None else "")
        )
    return int(value)


def _number(rate: Any) -> float:
    """NaN for what is no number."""
    try:
        return math.nan if isinstance(rate, (bool, str, bytes)) else float(rate)
    except (TypeError, ValueError, OverflowError):
        return math.nan
