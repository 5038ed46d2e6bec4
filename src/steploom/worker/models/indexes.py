"""The index of a folder in diffusers layout: what is wrong with it is said before anything is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, TypeGuard, cast

from steploom.errors import ConfigError
from steploom.weave import untyped
from steploom.worker.models.sources import INDEX

_WEIGHTS = re.compile(r"\w*model(?:\.(\w+))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)")
"""Files of weights; the group is their variant."""


def check(folder: Path, setting: str) -> None:
    """Refuses an index that names no pipeline, or components that are none.

    Args:
        folder: Where the index is.
        setting: Which setting gave the folder, and its value, for the message.

    Raises:
        ConfigError: Says what is wrong with it, and the mend.
    """
    index = _read(folder, setting)
    named = index.get("_class_name")
    if isinstance(named, str):
        if not untyped.has(named):
            raise ConfigError(f"{setting}: {unknown_class(named, index.get('_diffusers_version'))}")
        _check_components(index, named, setting)
    elif not _is_pair(named):
        raise ConfigError(
            f"{setting}: the _class_name in its {INDEX} is {named!r}, not a pipeline's; give a folder written by "
            "save_pretrained"
        )
    elif not (folder / f"{named[0]}.py").is_file():
        raise ConfigError(f"{setting}: its {INDEX} names {named[1]} of {named[0]}.py, and there is no such file in it")


def unknown_class(name: str, saved_by: Any = None) -> str:
    """That diffusers lacks the class of a pipeline, and what to do.

    Args:
        name: The class.
        saved_by: The version of diffusers that wrote the index, if known.
    """
    written = f" (diffusers {saved_by} wrote this folder)" if saved_by else ""
    return (
        f"this diffusers, {metadata.version('diffusers')}, has no {name}{written}; upgrade diffusers, or give a folder "
        "that brings its own code (in _class_name, file and class), with trust_remote_code=True"
    )


def missing(folder: Path) -> list[str]:
    """Components that the index of ``folder`` lists, and that have no folder in it."""
    try:
        index = _read(folder, "")
    except ConfigError:
        return []
    return [name for name, entry in index.items()
            if not name.startswith("_") and _is_pair(entry) and not (folder / name).is_dir()]  # fmt: skip


def variants(folder: Path) -> list[str]:
    """The variants of which ``folder`` has weights for components without plain ones."""
    alone: set[str] = set()
    for component in folder.iterdir():
        found = {match[1] or "" for file in component.glob("*model*") if (match := _WEIGHTS.fullmatch(file.name))}
        alone |= set() if "" in found else found
    return sorted(alone)


def _read(folder: Path, setting: str) -> Mapping[str, Any]:
    try:
        index: Any = json.loads((folder / INDEX).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{setting}: its {INDEX} cannot be read as JSON: {error}") from error
    if not isinstance(index, dict):
        raise ConfigError(
            f"{setting}: its {INDEX} holds a {type(index).__name__}, not an object with a _class_name; give a folder "
            "written by save_pretrained"
        )
    return cast("dict[str, Any]", index)


def _check_components(index: Mapping[str, Any], named: str, setting: str) -> None:
    cls = untyped.pipeline_class(named)
    for name in [] if cls is None else untyped.component_names(cls):
        entry = index.get(name, [None])
        if not _is_pair(entry) and not (isinstance(entry, list) and cast("list[Any]", entry)[:1] == [None]):
            raise ConfigError(
                f"{setting}: its {INDEX} says {json.dumps(entry)[:80]} of {name}, not library and class, such as "
                '["diffusers", "AutoencoderKL"]'
            )


def _is_pair(entry: Any) -> TypeGuard[list[str]]:
    """Whether an entry says library and class, or file and class."""
    return (
        isinstance(entry, list)
        and len(cast("list[Any]", entry)) == 2
        and all(isinstance(one, str) for one in cast("list[Any]", entry))
    )
