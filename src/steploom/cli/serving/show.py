"""``steploom config show``: the settings of ``steploom serve`` that are in force, and where each came from."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from steploom.cli import arguments
from steploom.cli.option import ENGINE, FIELDS, FILE, MASK, PREFIX, Layers, Option, is_secret
from steploom.cli.serving import serve
from steploom.config import EngineConfig

_WIDTH = 48
"""Columns that an entry takes before its comment."""

_HELP = """
Every option of `steploom serve` is also a variable of the environment and an entry of a file. What the command line
says counts more than the environment, that more than the file, and that more than the default.

  steploom serve --max-batch 8 --api-key-file keys     the command line
  STEPLOOM_MAX_BATCH=8 STEPLOOM_API_KEY_FILE=keys      the environment; several values are separated by commas
  steploom serve --config serve.toml                   a file:

    model = "./my-sd3"
    host = "0.0.0.0"
    max_batch = 8                                      # max-batch will do as well
    keep_abandoned = true                              # options without a value are true or false
    served_model_name = ["shapes", "demo"]             # options that may be repeated are arrays

    [lora_model]                                       # NAME=PATH options may be tables
    ink = "./ink.safetensors"

    [engine]                                           # any other field of EngineConfig
    vae_tiling = true
    costs_file = "none"                                # where there may be none, of numbers too

STEPLOOM_CONFIG names a file too. Paths are relative to the working directory. Whatever is unknown or of the wrong kind
in the file ends the command with a message that names it.
"""
_EXAMPLES = """
examples:
  what would be in force, and why
    steploom config show --config serve.toml --port 9000
  begin a file with the defaults, which `steploom serve --config serve.toml` takes as it is
    steploom config show > serve.toml

API keys are not shown: replace what stands in their place, or use --api-key-file.
"""


def add_parser(commands: arguments.Commands) -> None:
    """Adds ``config`` to the command."""
    summary = "explain and show the settings of `steploom serve`"
    parser = commands.add_parser(
        "config", help=summary, description=f"{summary[0].upper()}{summary[1:]}.\n{_HELP}", epilog=_EXAMPLES
    )
    below: Any = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, dest="config_command")
    shown = arguments.add_command(
        below, "show", run, summary="print the settings that are in force, as a file for --config", examples=_EXAMPLES
    )
    serve.add_options(shown)


def run(options: argparse.Namespace) -> int:
    """Runs ``steploom config show``.

    Raises:
        ConfigError: A setting is wrong.
    """
    config = serve.engine_config(options)
    print("\n".join(lines(options, config)))  # noqa: T201 - this is the command's output
    return 0


def lines(options: argparse.Namespace, config: EngineConfig) -> Iterator[str]:
    """The settings as TOML; tables come last, since whatever follows a table belongs to it."""
    layers: Layers = options.layers
    yield "# The settings of `steploom serve` that are in force; of use as a file for --config."
    if options.config is not None:
        yield f"# The file is {json.dumps(str(options.config))}."
    yield ""
    tables: list[str] = []
    for name, option in layers.options.items():
        if name in (FILE, ENGINE, "verbose"):
            continue
        value, source = getattr(options, name), options.sources[name]
        if value is None:
            value = getattr(config, FIELDS.get(name, name), None)
            source = "environment" if any(one in os.environ for one in option.variables) else source
        whence = _whence(source)
        if option.kind == "list" and value and isinstance(value[0], tuple):
            tables += ["", f"[{name}]  {whence}", *(f"{_key(key)} = {toml(entry)}" for key, entry in value)]
        else:
            yield _line(name, _shown(option, value), whence)
    yield from tables
    yield from _engine(options, config)


def _engine(options: argparse.Namespace, config: EngineConfig) -> Iterator[str]:
    """The other fields of the engine; those that nobody has set are comments."""
    own = {FIELDS.get(name, name) for name in options.layers.options}
    given = dict(options.engine)
    yield from ("", f"[{ENGINE}]")
    for field in dataclasses.fields(EngineConfig):
        name = field.name
        if name in own and name not in given:
            continue
        value = given.get(name, getattr(config, name))
        set_there = f"{PREFIX}{name.upper()}" in os.environ
        source = options.sources.get(f"{ENGINE}.{name}") or ("environment" if set_there else "default")
        text = toml(value) if value is not None else None if field.default is None else toml("none")
        line = _line(name, text, _whence(source))
        yield line if source != "default" or line.startswith("#") else f"# {line}"


def _shown(option: Option, value: Any) -> str | None:
    """``value`` as TOML; None where there is none."""
    if value is None:
        return None
    if option.kind == "flag":
        return toml(value != option.flag(False))
    if is_secret(option.name) and value:
        return toml([MASK] * len(value) if isinstance(value, list) else MASK)  # pyright: ignore[reportUnknownArgumentType]
    return toml(value)


def _line(name: str, text: str | None, whence: str) -> str:
    entry = f"# {name} =" if text is None else f"{name} = {text}"
    return f"{entry:<{_WIDTH}}  {whence}"


def _whence(source: str) -> str:
    return "# default" if source == "default" else f"# from the {source}"


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else toml(name)


def toml(value: Any) -> str:
    """``value`` as TOML writes it.

    Raises:
        TypeError: It is nothing that TOML knows.
    """
    if isinstance(value, (bool, int, float)):
        return json.dumps(value)
    if isinstance(value, (str, Path)):
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        entries = cast("Mapping[str, Any]", value).items()
        return "{" + ", ".join(f"{_key(name)} = {toml(entry)}" for name, entry in entries if entry is not None) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(toml(entry) for entry in cast("list[Any]", value)) + "]"
    raise TypeError(f"{value!r:.80}: cannot be written as TOML")
