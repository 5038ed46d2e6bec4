"""A request's own noise scheduler: which classes of diffusers go with a pipeline's, and making one."""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Mapping
from itertools import chain
from typing import Any, NamedTuple

from steploom.errors import InvalidRequest
from steploom.given import is_number
from steploom.media.pictures import brief
from steploom.noise_schedulers import check_noise_scheduler
from steploom.weave import signatures, untyped
from steploom.weave.noise.loop_calls import fault, loop_of

_STEP = {"self", "model_output", "timestep", "sample"}
"""All that a pipeline's loop has for ``step``, whatever its noise scheduler."""

_UNMADE = (TypeError, ValueError, ArithmeticError, LookupError, ImportError, RuntimeError)
"""What is raised where a noise scheduler cannot be made."""

_KEPT = 64
_CHOICES: dict[tuple[type, type, str], dict[str, list[str]]] = {}
"""What goes with a pipeline's class and its noise scheduler's settings: it takes a while to find out."""


class _Known(NamedTuple):
    """A noise scheduler class of diffusers.

    Attributes:
        kinds: What its models predict; empty where that is not known.
        settings: What it can be made with.
        plain: Whether the configuration of any other will do to make one, and loops have all that its ``step`` needs.
        told: What ``set_timesteps`` takes.
        counts_calls: Whether it says how many calls of the denoiser a step has (``order``), as most loops ask.
    """

    kinds: frozenset[str]
    settings: list[str]
    plain: bool
    told: frozenset[str]
    counts_calls: bool


def choices(base: Any, pipeline: Any = None) -> dict[str, list[str]]:
    """The classes that can stand in for the noise scheduler ``base``, and the settings that each takes.

    Flow-matching models and models that predict noise do not understand each other's noise schedulers. Of a class of
    somebody's own it is not known which of them it is for: the pipeline will say.

    Args:
        base: The pipeline's own.
        pipeline: Classes that its code knows by name (CogVideoX calls one of two otherwise) go with it in any case.
    """
    found: Any = getattr(base, "config", {})
    key = (type(base), type(pipeline), repr(sorted(found.items(), key=str)))
    if key not in _CHOICES:
        if len(_CHOICES) >= _KEPT:
            _CHOICES.clear()
        _CHOICES[key] = _choices(base, pipeline)
    return _CHOICES[key]


def _choices(base: Any, pipeline: Any) -> dict[str, list[str]]:
    cls, wanted = type(base), _kind_of(base)
    own, foreign = _describe(cls), cls.__name__ not in _known()
    turning = _turning(pipeline, base)
    classes = [one for turned in turning for one in type(turned).__mro__ if "__call__" in vars(one)]
    calls: list[Any] = [inspect.unwrap(vars(one)["__call__"]) for one in classes]
    codes = [call.__code__ for call in calls if hasattr(call, "__code__")]
    named = set(chain.from_iterable(code.co_names for code in codes))
    imported = set[str](chain.from_iterable(getattr(call, "__globals__", ()) for call in calls))
    ratios = _by_ratios(cls) and cls.__name__ not in named  # its loop would take others' timesteps for such
    counts_calls = any("order" in code.co_names for code in codes) if codes else own.counts_calls

    def goes(one: _Known) -> bool:
        if ratios or not one.plain or one.counts_calls < counts_calls:
            return False
        return bool(wanted & one.kinds) if wanted else foreign or (not one.kinds and own.told <= one.told)

    loops = [loop for turned in turning if (loop := loop_of(type(turned))) is not None]

    def follows(name: str) -> bool:
        """Whether the loops can call one that is made of the pipeline's configuration."""
        try:
            return all(fault(loop, _made(base, name, {}), base) is None for loop in loops)
        except _UNMADE:
            return False

    named, known = named | {cls.__name__}, _known().items()
    found = {name: one for name, one in known if name in named or name in imported or goes(one)}
    return {name: one.settings for name, one in found.items() if name in named or follows(name)}


def _turning(pipeline: Any, base: Any) -> list[Any]:
    """The pipelines in whose loops ``base`` is: a combined pipeline has no loop, but pipelines that do."""
    members: dict[str, Any] = getattr(pipeline, "__dict__", {})
    nested = [one for one in members.values() if untyped.is_pipeline(one) and getattr(one, "scheduler", None) is base]
    loop = loop_of(type(pipeline)) if nested else None
    return nested if loop is not None and not loop.steps and not loop.reads else [pipeline, *nested]


def lacking(base: Any) -> dict[str, str]:
    """Classes that would go with ``base`` but for packages that are not installed, and those packages.

    All such classes of diffusers are samplers of k-diffusion's, for models that predict noise.
    """
    return {} if _kind_of(base) == frozenset({"flow"}) else _lacking()


@functools.cache
def _lacking() -> dict[str, str]:
    absent = {name: cls._backends for name, cls in untyped.noise_scheduler_classes().items() if _is_absent(cls)}
    return {
        name: " and ".join(package for package in packages if importlib.util.find_spec(package) is None)
        for name, packages in absent.items()
    }


def _is_absent(cls: Any) -> bool:
    return hasattr(cls, "_backends")


@functools.cache
def _known() -> dict[str, _Known]:
    """The noise scheduler classes of diffusers that are installed."""
    return {name: _describe(cls) for name, cls in untyped.noise_scheduler_classes().items() if not _is_absent(cls)}


@functools.lru_cache(maxsize=64)
def _describe(cls: Any) -> _Known:
    step, set_timesteps = (getattr(cls, name, None) for name in ("step", "set_timesteps"))
    kinds, settings = _kinds(cls), signatures.parameters_of(cls.__init__)[1:]
    callable_so = step is not None and set_timesteps is not None and set(signatures.needed_by(step)) <= _STEP
    plain = callable_so and not _by_ratios(cls) and signatures.needed_by(cls.__init__) == ["self"]
    told = frozenset(() if set_timesteps is None else signatures.parameters_of(set_timesteps))
    return _Known(kinds, settings, plain, told, hasattr(cls, "order"))


def _by_ratios(cls: Any) -> bool:
    """Whether its timesteps are from 1 to 0 (Wuerstchen's), where others have numbers."""
    return "noise" in _kinds(cls) and "num_train_timesteps" not in signatures.parameters_of(cls.__init__)


def _kinds(cls: Any) -> frozenset[str]:
    named_so = "FlowMatch" in cls.__name__ or cls.__name__.endswith("RFScheduler")  # LTX's: of rectified flow
    if named_so or hasattr(cls, "scale_noise"):  # what they have for add_noise
        return frozenset({"flow"})
    if not getattr(cls, "_compatibles", None) and not hasattr(cls, "scale_model_input"):
        return frozenset()
    return frozenset({"noise", "flow"} if "use_flow_sigmas" in signatures.parameters_of(cls.__init__) else {"noise"})


def _kind_of(base: Any) -> frozenset[str]:
    """What the model of ``base`` predicts."""
    settings: Any = getattr(base, "config", {})
    if settings.get("use_flow_sigmas") or settings.get("prediction_type") == "flow_prediction":
        return frozenset({"flow"})
    kinds = _kinds(type(base))
    return frozenset({"noise"}) if len(kinds) > 1 else kinds


def replacement(base: Any, override: str | Mapping[str, Any], pipeline: Any = None) -> Any:
    """The request's own noise scheduler, from the pipeline's configuration and the given settings.

    A class for either kind of model is set to flows where the pipeline's own is for flows alone, whose configuration
    does not say so: what it makes of that by itself are the sigmas of noise.

    Raises:
        InvalidRequest: There is no such class or setting.
    """
    own = None if base is None else type(base).__name__
    check_noise_scheduler(override, choices(base, pipeline), own, lacking(base))
    settings = {"class": override} if isinstance(override, str) else dict(override)
    name = settings.pop("class", type(base).__name__)
    _check_numbers(type(base) if name == own else untyped.noise_scheduler_classes()[name], settings)
    try:
        return _made(base, name, settings)
    except _UNMADE as error:
        raise InvalidRequest(f"noise_scheduler={override!r}: {error}", field="noise_scheduler") from None


def _check_numbers(cls: Any, settings: Mapping[str, Any]) -> None:
    """Refuses what is no number where a class has one by default; it would fail somewhere in its arithmetic."""
    parameters = inspect.signature(cls.__init__).parameters
    for setting, value in settings.items():
        default: Any = parameters[setting].default if setting in parameters else None
        if type(default) in (int, float) and value not in (None, default) and not is_number(value):
            raise InvalidRequest(
                f"noise_scheduler[{setting!r}]={brief(value)}: {cls.__name__} takes a number, {default!r} by default",
                field="noise_scheduler",
            )


def _made(base: Any, name: str, settings: Mapping[str, Any]) -> Any:
    """One of the class ``name``, from the configuration of ``base``."""
    cls: Any = type(base) if name == type(base).__name__ else untyped.noise_scheduler_classes()[name]
    with untyped.quietly():  # of settings that the other class does not have
        return cls.from_config(getattr(base, "config", {}), **_flows(base, cls, settings), **settings)


def _flows(base: Any, cls: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What sets ``cls`` to flows, with the shift of ``base``, where neither that nor ``settings`` say which it is."""
    own: Any = getattr(base, "config", {})
    takes = signatures.parameters_of(cls.__init__)
    said = "use_flow_sigmas" in own or not settings.get("use_flow_sigmas", True)
    if said or "use_flow_sigmas" not in takes or _kind_of(base) != frozenset({"flow"}):
        return {}
    found: dict[str, Any] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    if isinstance(own.get("shift"), (int, float)) and not own.get("use_dynamic_shifting"):
        found["flow_shift"] = own["shift"]
    return {name: value for name, value in found.items() if name in takes and name not in settings}
