"""Settings of a command: its options, else variables of the environment, else a file, else defaults.

Generic over the options of a parser: ``--max-batch 8`` is ``STEPLOOM_MAX_BATCH=8`` and ``max_batch = 8`` in the file.
"""

from __future__ import annotations

import argparse
import copy
import difflib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steploom.cli.option import (
    ENGINE,
    ENGINE_FIELDS,
    FIELDS,
    FILE,
    MASK,
    PREFIX,
    TRUTH,
    Layers,
    Option,
    Source,
    is_secret,
)
from steploom.cli.serving import settings_file
from steploom.errors import ConfigError

log = logging.getLogger("steploom.settings")


def layer(parser: argparse.ArgumentParser) -> None:
    """Makes all options of ``parser`` settings: to be called once they are all added.

    The parsed arguments are then to be given to :func:`complete`.
    """
    options: dict[str, Option] = {}
    for action in parser._actions:  # pyright: ignore[reportPrivateUsage] # argparse has no public way
        if not action.option_strings or argparse.SUPPRESS in (action.dest, action.default):  # --help among them
            continue
        if action.help and action.help is not argparse.SUPPRESS:  # the default is about to be hidden from it
            action.help = (action.help % {**vars(action), "prog": parser.prog}).replace("%", "%%")
        options[action.dest] = Option(action.dest, action, action.default)
        action.default = argparse.SUPPRESS
    parser.set_defaults(layers=Layers(options))


def complete(arguments: argparse.Namespace, env: Mapping[str, str] | None = None) -> None:
    """Sets what the command line did not say, and ``sources``: where each option came from, by name.

    Without effect on a command whose parser was not given to :func:`layer`.

    Raises:
        ConfigError: A variable or an entry of the file is wrong.
    """
    layers: Layers | None = getattr(arguments, "layers", None)
    if layers is None:
        return
    env = os.environ if env is None else env
    given: dict[str, tuple[Source, Any]]
    given = {name: ("command line", getattr(arguments, name)) for name in layers.options if name in arguments}
    if getattr(arguments, "served", None) is not None:
        if "model" in given:
            raise ConfigError(f"--model {arguments.model}: MODEL={arguments.served} is given already; leave one out")
        given["model"] = ("command line", arguments.served)
    found = {**_environment(layers, env), **given}
    place = found.get(FILE, (None, None))[1]
    filed = settings_file.read(layers, Path(place)) if place else {}
    _settle_engine(layers, env, found, filed)
    arguments.sources = dict[str, Source]()
    for name, option in layers.options.items():
        source, value = found.get(name) or (("file", filed[name]) if name in filed else ("default", option.default))
        setattr(arguments, name, copy.copy(value))
        arguments.sources[name] = source
    said = _engine_entries(found)
    arguments.engine = [*filed.get(ENGINE, []), *said.items()]
    for field, _ in arguments.engine:
        arguments.sources[f"{ENGINE}.{field}"] = "command line" if field in said else "file"


def _engine_entries(found: Mapping[str, tuple[Source, Any]]) -> dict[str, Any]:
    """What ``--engine`` said, by field."""
    entries: list[tuple[str, Any]] = found[ENGINE][1] if ENGINE in found else []
    return dict(entries)


def _settle_engine(
    layers: Layers, env: Mapping[str, str], found: dict[str, tuple[Source, Any]], filed: dict[str, Any]
) -> None:
    """A field of the engine can be set by an option of its own and by ``--engine``; only the stronger one stays."""
    options = {FIELDS.get(name, name): option for name, option in layers.options.items()}
    said = _engine_entries(found)
    kept: list[tuple[str, Any]] = []
    for field, value in filed.get(ENGINE, []):
        option = options.get(field)
        variables = option.variables if option is not None else (PREFIX + field.upper(),)
        outdone = option is not None and option.name in found
        if field not in said and not outdone and not any(one in env for one in variables):
            kept.append((field, value))
    filed[ENGINE] = kept
    for field in said:
        name = options[field].name if field in options else ""
        if found.get(name, ("",))[0] != "command line":
            found.pop(name, None)
            filed.pop(name, None)


def warn_of_unknown(arguments: argparse.Namespace, env: Mapping[str, str] | None = None) -> None:
    """Warns of variables that look like settings and are none."""
    layers: Layers | None = getattr(arguments, "layers", None)
    if layers is None:
        return
    known = {variable for name, option in layers.options.items() if name != ENGINE for variable in option.variables}
    known |= {PREFIX + field.upper() for field in ENGINE_FIELDS}
    for name in sorted(os.environ if env is None else env):
        if name.startswith(PREFIX) and name not in known:
            nearest = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            log.warning("%s: there is no such setting, it has no effect%s", name, hint)


def _environment(layers: Layers, env: Mapping[str, str]) -> dict[str, tuple[Source, Any]]:
    found: dict[str, tuple[Source, Any]] = {}
    for name, option in layers.options.items():
        variable = next((one for one in option.variables if env.get(one, "").strip()), None)
        if variable is None or name == ENGINE:  # which has a variable for each of its fields
            continue
        raw = env[variable].strip()
        if raw.startswith("{") and FIELDS.get(name, name) in ENGINE_FIELDS:
            continue  # a mapping, which EngineConfig reads itself
        try:
            found[name] = ("environment", _from_text(option, raw))
        except ConfigError as error:
            shown = MASK if is_secret(name) else repr(raw)
            raise ConfigError(f"{variable}={shown}: {error}; correct or unset that variable") from None
    return found


def _from_text(option: Option, raw: str) -> Any:
    if option.kind == "flag":
        if raw.lower() not in TRUTH:
            raise ConfigError("must be true or false")
        return option.flag(TRUTH[raw.lower()])
    if option.kind == "list":
        return [option.read(part.strip()) for part in raw.split(",") if part.strip()]
    return option.read(raw)
