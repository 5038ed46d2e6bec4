"""Factories: functions of the application that make a pipeline, called in the worker."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any

from steploom.config import EngineConfig
from steploom.errors import ConfigError
from steploom.weave import untyped

_MODULAR = "diffusers.modular_pipelines."
"""Where diffusers has its modular pipelines and their blocks."""


def call(config: EngineConfig, name: str, dtype: Any) -> Any:
    """What the factory gives. A script's folder and the current one are where its module is looked for, too.

    Args:
        config: The engine's settings.
        name: ``"pkg.module:function"``.
        dtype: To which its pipeline is moved, if the settings name one.

    Raises:
        ConfigError: There is no such function, it wants other arguments, or gives no pipeline.
    """
    module, _, path = name.partition(":")
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        factory: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(
            f"model={config.model!r}: there is no module {error.name!r} to import in the worker; run where it is, "
            "install it, or put its folder into PYTHONPATH"
        ) from None
    for part in path.split("."):
        factory = getattr(factory, part, None)
    if not callable(factory):
        raise ConfigError(f"model={config.model!r}: {module} has no function {path!r}")
    positional, named = _arguments(factory, config)
    made: Any = factory(*positional, **named)
    if not untyped.is_pipeline(made):
        raise ConfigError(f"model={config.model!r}: gave {no_pipeline(made)}; return a DiffusionPipeline")
    if config.dtype != "auto":
        made = made.to(dtype)
    return untyped.for_task(made, config.task)


def no_pipeline(value: Any) -> str:
    """What ``value`` is, which is no diffusers pipeline: for messages."""
    cls: type = value if isinstance(value, type) else type(value)
    name = f"{'the class ' if cls is value else ''}{cls.__module__}.{cls.__qualname__}"
    if any(f"{base.__module__}.".startswith(_MODULAR) for base in cls.__mro__):
        return f"{name}, which belongs to a modular pipeline, and those are not served"
    return f"{name}, which is no diffusers pipeline"


def _arguments(factory: Any, config: EngineConfig) -> tuple[list[Any], dict[str, Any]]:
    """What a factory is called with: the engine's settings, for the one argument that it asks for, or nothing.

    Raises:
        ConfigError: It asks for more.
    """
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return [], {}
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    takes = [parameter for parameter in parameters if parameter.kind not in variadic]
    wanted = [parameter for parameter in takes if parameter.default is parameter.empty]
    if len(wanted) > 1:
        names = " and ".join(parameter.name for parameter in wanted)
        raise ConfigError(f"model={config.model!r}: asks for {names}; a factory takes nothing, or the EngineConfig")
    wanted = wanted or [parameter for parameter in takes if _is_for_config(parameter)]
    for parameter in wanted:
        if parameter.kind is not parameter.POSITIONAL_ONLY:
            return [], {parameter.name: config}
        if parameter is takes[0]:
            return [config], {}
    return [], {}


def _is_for_config(parameter: inspect.Parameter) -> bool:
    """Whether a parameter with a default is meant for the engine's settings, by its annotation, or else its name."""
    kind: Any = parameter.annotation
    if kind is parameter.empty:
        return parameter.name == "config" and isinstance(parameter.default, EngineConfig | None)
    return EngineConfig.__name__ in re.findall(r"\w+", kind.__name__ if isinstance(kind, type) else str(kind))
