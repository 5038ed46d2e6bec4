"""A file with settings: TOML whose entries are called as the options are."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from steploom.cli.option import ENGINE, ENGINE_FIELDS, FILE, Layers, Option, is_secret
from steploom.errors import ConfigError


def read(layers: Layers, path: Path) -> dict[str, Any]:
    """What a file says, by the option's name.

    Raises:
        ConfigError: It cannot be read, or an entry is wrong; names the entry, the file and the mend.
    """
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read: {error.strerror}; give a TOML file") from None
    except (ValueError, RecursionError) as error:  # no UTF-8, no TOML
        raise ConfigError(f"--config {path}: is no TOML: {error}") from None
    found: dict[str, Any] = {}
    for key, value in entries.items():
        name = key.replace("-", "_")
        option = layers.options.get(name)
        if option is None or name == FILE:
            raise ConfigError(f"{path}: {key}: {_unknown(layers, name)}")
        if name in found:
            raise ConfigError(f"{path}: {key}: is there twice, with - and with _; leave one out")
        try:
            found[name] = _from_toml(layers, option, value)
        except ConfigError as error:
            shown = "" if is_secret(name) or isinstance(value, dict) else f" = {_brief(value)}"
            raise ConfigError(f"{path}: {key}{shown}: {error}") from None
    return found


def _unknown(layers: Layers, name: str) -> str:
    if name == FILE:
        return "a file cannot name another one; leave it out"
    if name == "served":
        return "there is no such setting; did you mean model?"
    field = "max_queue" if name == "max_waiting" else name
    if field in layers.options:
        return f"there is no such setting; did you mean {field}?"
    if name in ENGINE_FIELDS:
        return f"is a field of EngineConfig; write it below a line [{ENGINE}]"
    return f"there is no such setting; {layers.near(name)}"


def _from_toml(layers: Layers, option: Option, value: Any) -> Any:
    if option.kind == "flag":
        if not isinstance(value, bool):
            raise ConfigError("must be true or false, without quotes")
        return option.flag(value)
    if isinstance(value, dict):
        return list(_table(layers, option, cast("dict[str, Any]", value)))
    if option.kind == "list":
        items = cast("list[Any]", value) if isinstance(value, list) else [value]
        return [_one(option, item) for item in items]
    if isinstance(value, list):
        raise ConfigError("must be one value, not an array")
    return _one(option, value)


def _table(layers: Layers, option: Option, table: dict[str, Any]) -> Iterator[Any]:
    """``NAME=VALUE`` options as a table."""
    if option.kind != "list" or "=" not in str(option.action.metavar):
        raise ConfigError("must not be a table")
    for name, value in table.items():
        if option.name == ENGINE and name not in ENGINE_FIELDS and name.replace("-", "_") in layers.options:
            raise ConfigError(f"{name} is no field of EngineConfig; write it above the line [{ENGINE}]")
        if option.name != ENGINE and not isinstance(value, str):
            raise ConfigError(f"{name} = {_brief(value)}: must be a string, in quotes")
        try:
            text = json.dumps(value) if option.name == ENGINE else value
        except TypeError:
            raise ConfigError(f"{name} = {value}: must not be a date") from None
        try:
            yield option.read(f"{name}={text}")
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None


def _one(option: Option, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ConfigError("must be a string or a number")
    if isinstance(value, str) and option.action.type is None:
        return option.read(value)
    read = option.read(str(value))
    numeric = isinstance(read, (int, float))
    if isinstance(value, str) and numeric:
        raise ConfigError(f"must be a number: write {read} without quotes")
    if not isinstance(value, str) and not numeric:
        raise ConfigError("must be a string, in quotes")
    return read


def _brief(value: Any) -> str:
    return f"{value!r:.80}"
