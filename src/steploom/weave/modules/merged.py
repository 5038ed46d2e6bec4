"""What the application has set on modules: one forward serves the requests of many, so it cannot mean that of one."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping
from types import FunctionType, MethodType
from typing import Any, cast

from torch import nn

from steploom.errors import ConfigError
from steploom.weave import untyped
from steploom.weave.modules.rebinding import class_refusal
from steploom.weave.modules.rebuilding import attributes_of
from steploom.weave.modules.references import MOST, References, TooMany, read_of, set_on_libraries

log = logging.getLogger(__name__)

_TABLES = ("_modules", "_parameters", "_buffers", "_compiled_call_impl")
_SETTERS = "set_"
"""Functions that pipelines call, and forwards do not: they mean the request's own module."""


def refuse_modules(pipeline: Any, modules: Mapping[str, nn.Module]) -> None:
    """Refuses hooks, attention processors, functions and classes of modules that come to the pipeline.

    Also methods of the application in a library's class of another part: these are looked for here alone, once.

    Args:
        pipeline: The user's pipeline.
        modules: Its modules by component.

    Raises:
        ConfigError: One does, or to what each request has its own copy of; says which, and what to do.
    """
    references = References(_of_requests(pipeline))
    for name, value in [("pipe", pipeline), *((f"pipe.{name}", one) for name, one in vars(pipeline).items())]:
        if not issubclass(type(value), nn.Module) and references.lead(set_on_libraries(type(value))):
            raise class_refusal(type(value), name)
    classes: set[type] = set()
    for component, module in modules.items():
        for path, part in module.named_modules():
            held = {name: _read(one) for name, one in part.__dict__.items() if _counts(name, one, top=not path)}
            if type(part) not in classes:
                classes.add(type(part))
                held[f"class {type(part).__name__}"] = (type(part), set_on_libraries(type(part)))
            found = _found(references, held)
            if found is not None:
                raise _refusal(f"pipe.{component}.{path}".rstrip("."), *found)


def _counts(name: str, value: Any, *, top: bool) -> bool:
    """Whether an attribute of a module may do something in a forward."""
    empty = type(value) in (dict, OrderedDict, list) and not value
    return not empty and name not in _TABLES and not (top and name.startswith(_SETTERS))


def _read(value: Any) -> Any:
    """``value``; of hooks, and methods of the application's objects, what these read, not all that the objects hold."""
    if issubclass(type(value), OrderedDict):
        return list(map(_read, cast("OrderedDict[Any, Any]", value).values()))
    if type(value) is not MethodType or issubclass(type(value.__self__), (nn.Module, type)):
        return value
    owner, waiting, read = value.__self__, [value.__func__], dict[int, Any]()
    held = attributes_of(owner)
    while waiting:
        one: Any = waiting.pop()
        one = one.fget if isinstance(one, property) else one
        if id(one) in read:
            continue
        read[id(one)] = one
        if isinstance(one, FunctionType):
            names = read_of(one.__code__).attributes
            waiting += [held[name] if name in held else getattr(type(owner), name, None) for name in names]
    return list(read.values())


def _of_requests(pipeline: Any) -> set[int]:
    """What requests have copies of, but for modules."""
    found = {id(pipeline)}
    for value in vars(pipeline).values():
        if untyped.is_pipeline(value) and value is not pipeline:
            found |= _of_requests(value)
        elif untyped.is_noise_scheduler(value) or untyped.is_guider(value):
            found.add(id(value))
    return found


def _found(references: References, held: Mapping[str, Any]) -> tuple[str, str] | None:
    """Which of these comes to what is looked for, and how that is said."""
    name = min(held, default="")
    try:
        if not references.lead(held.values()):
            return None
        name = next(name for name, one in held.items() if references.lead([one]))
    except TooMany:
        log.warning("%s of a module comes to more than %d objects: not looked through for the pipeline", name, MOST)
        return None
    return name, "comes to the pipeline or its noise scheduler"


def _refusal(where: str, name: str, comes: str) -> ConfigError:
    what = f"the {name} of {where}" if name.startswith("class ") else f"{where}.{name}"
    if name.endswith("_hooks"):
        what = f"a hook on {where} ({name})"
    return ConfigError(
        f"{what} {comes}: one forward of the module serves several requests, so it cannot mean that of one; what "
        "depends on the request belongs into callback_on_step_end, or into the arguments of the module"
    )
