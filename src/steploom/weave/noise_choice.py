"""A request's own noise scheduler: which classes of diffusers go with a pipeline's, and making one."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from steploom.errors import InvalidRequest
from steploom.noise_schedulers import check_noise_scheduler
from steploom.weave import signatures, untyped


def choices(base: Any) -> dict[str, list[str]]:
    """The classes that can stand in for the noise scheduler ``base``, and the settings that each takes.

    Flow-matching models and models that predict noise do not understand each other's noise schedulers. A class of
    which neither is known is left to the pipeline.
    """
    wanted = _kind_of(base)
    return {name: settings for name, (kinds, settings) in _known().items() if not (wanted and kinds) or wanted & kinds}


@functools.cache
def _known() -> dict[str, tuple[frozenset[str], list[str]]]:
    """For each noise scheduler class of diffusers: what its models predict, as far as is known, and its settings."""
    return {
        name: (_kinds(cls), signatures.parameters_of(cls.__init__)[1:])
        for name, cls in untyped.noise_scheduler_classes().items()
    }


def _kinds(cls: Any) -> frozenset[str]:
    kinds: set[str] = set()
    if "FlowMatch" in cls.__name__ or cls.__name__.endswith("RFScheduler"):  # LTX's: of rectified flow
        return frozenset({"flow"})
    if getattr(cls, "_compatibles", None):
        kinds.add("noise")
    if kinds and "use_flow_sigmas" in signatures.parameters_of(cls.__init__):
        kinds.add("flow")
    return frozenset(kinds)


def _kind_of(base: Any) -> frozenset[str]:
    """What the model of ``base`` predicts."""
    settings: Any = getattr(base, "config", {})
    if settings.get("use_flow_sigmas") or settings.get("prediction_type") == "flow_prediction":
        return frozenset({"flow"})
    kinds = _kinds(type(base))
    return frozenset({"noise"}) if len(kinds) > 1 else kinds


def replacement(base: Any, override: str | Mapping[str, Any]) -> Any:
    """The request's own noise scheduler, from the pipeline's configuration and the given settings.

    Raises:
        InvalidRequest: There is no such class or setting.
    """
    check_noise_scheduler(
        override, {} if base is None else choices(base), None if base is None else type(base).__name__
    )
    settings = {"class": override} if isinstance(override, str) else dict(override)
    name = settings.pop("class", type(base).__name__)
    cls: Any = untyped.noise_scheduler_classes().get(name, type(base))
    try:
        return cls.from_config(getattr(base, "config", {}), **settings)
    except (TypeError, ValueError, ArithmeticError, LookupError, ImportError, RuntimeError) as error:
        raise InvalidRequest(f"noise_scheduler={override!r}: {error}", field="noise_scheduler") from None
