"""What a request may say about its noise scheduler (``noise_scheduler=``), and whether that exists. No torch."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, cast

from steploom import given
from steploom.errors import InvalidRequest
from steploom.media.pictures import brief


def by_name(noise_scheduler: Any) -> Any:
    """A noise scheduler, or its class, as what travels: its name, and the settings of an object."""
    if isinstance(noise_scheduler, type):
        return noise_scheduler.__name__
    settings: Any = getattr(noise_scheduler, "config", None)
    if not isinstance(settings, Mapping) or not hasattr(noise_scheduler, "set_timesteps"):
        return noise_scheduler
    plain = {name: value for name, value in cast("Mapping[str, Any]", settings).items() if not name.startswith("_")}
    return {"class": type(noise_scheduler).__name__, **plain}


MOST = 100_000
"""The greatest whole number among their settings: noise levels (1000, of all models) and orders are lists so long."""

_UNBOUNDED = "lambda_min_clipped"
"""The one setting that is infinite by default: a bound that is none."""


def check_settings(override: str | Mapping[str, Any] | None) -> None:
    """Refuses settings of which no image comes, whatever the class: such as ``shift=nan``.

    Raises:
        InvalidRequest: Names the setting.
    """
    for setting, value in override.items() if isinstance(override, Mapping) else [("class", override)]:
        if setting != _UNBOUNDED or value != -math.inf:
            given.check("noise_scheduler", given.plain(value), f"noise_scheduler[{brief(setting)}]")
        if isinstance(value, int) and value > MOST:
            raise InvalidRequest(
                f"noise_scheduler[{brief(setting)}]={value}: must be at most {MOST}", field="noise_scheduler"
            )


def check_noise_scheduler(
    override: str | Mapping[str, Any],
    known: Mapping[str, list[str]],
    own: str | None,
    lacking: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Refuses a noise scheduler that does not exist, does not go with the model, or has no such setting.

    Args:
        override: A class name, or ``{"class": name, **settings}``.
        known: Classes that go with the model, and the settings that each takes.
        own: The class of the pipeline's own; None if it has none.
        lacking: Classes that would go with it but for packages that are not installed, and these packages.

    Raises:
        InvalidRequest: Names the nearest known.
    """
    settings = {"class": override} if isinstance(override, str) else dict(override)
    name = settings.pop("class", own)
    if own is None:
        raise InvalidRequest(
            f"noise_scheduler={brief(name)}: this pipeline has no noise scheduler; leave it out",
            field="noise_scheduler",
        )
    if package := lacking.get(str(name)):
        raise InvalidRequest(
            f"noise_scheduler={brief(name)}: needs {package}, which is not installed where the model runs; install it, "
            "or give another",
            field="noise_scheduler",
        )
    if name not in known and name != own:
        part = str(name).lower().replace(" ", "").replace("_", "")
        within = [one for one in sorted(known, key=len) if part and part in one.lower()]
        nearest = within[:3] or difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(nearest)}?" if nearest else f"there are {', '.join(sorted(known))}"
        raise InvalidRequest(
            f"noise_scheduler={brief(name)}: no scheduler class of diffusers that goes with the model's {own} has this "
            f"name; {hint}",
            field="noise_scheduler",
        )
    for setting in settings:
        takes = known.get(str(name), [])
        if takes and setting not in takes:
            nearest = difflib.get_close_matches(str(setting), takes, n=3, cutoff=0.5) or takes
            raise InvalidRequest(
                f"noise_scheduler: {name} has no setting {brief(setting)}; did you mean {' or '.join(nearest)}?",
                field="noise_scheduler",
            )
