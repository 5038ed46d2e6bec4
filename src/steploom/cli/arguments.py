"""What the subcommands' arguments have in common: kinds of values, options of the engine, errors in one line."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NoReturn, Protocol, TypeVar

from steploom import step_caches
from steploom.config import EngineConfig, expanded
from steploom.config.values import is_none
from steploom.errors import ConfigError, InvalidRequest
from steploom.requests import OWN_FIELDS

T = TypeVar("T")
EXIT_USAGE = 2
_ENGINES = "is the engine's, not the pipeline's; give it to engine.generate(...) in Python"
_OUTPUTS = "cannot be chosen here, since the outcome becomes a file, or is compared; leave it out"
_NOT_THE_PIPELINES = {
    **dict.fromkeys(OWN_FIELDS, _ENGINES),
    "output_type": _OUTPUTS,
    "return_dict": _OUTPUTS,
    "generator": "cannot be given here; use --seed instead",
    "self": "is no argument of the pipeline; leave it out",
}
"""Why ``--set`` does not take a name."""

Command = Callable[[argparse.Namespace], int]
"""A subcommand: takes the parsed arguments, returns the exit code."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose help keeps its line breaks, whose errors are one line, and who says what was meant."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(self, *args: Any, **options: Any) -> Any:
        """As argparse's; what a command does not know is its own error, with its own help."""
        known, unknown = super().parse_known_args(*args, **options)
        if unknown:
            given = list(args[0]) if args and args[0] is not None else sys.argv[1:]
            self.error(self._unknown(unknown, given[given.index("--") + 1 :] if "--" in given else []))
        return known, unknown

    def _unknown(self, words: list[str], behind: list[str]) -> str:
        """What to say of ``words`` that are not known, some perhaps of those ``behind`` the mark ``--``."""
        late = [word for word in words if word.startswith("-") and word in behind]
        if late:
            meaning = next((f"the {action.dest}" for action in self._actions if not action.option_strings), "no option")
            return f"{late[0]}: after -- everything is {meaning}; give options before --"
        options = [word.partition("=")[0] for word in words if word.startswith("-")]
        if not options:
            return f'{" ".join(words)!r} is too much; what has spaces needs quotes: "like this"'
        names = [name for action in self._actions for name in action.option_strings]
        return ", ".join(f"{option}: no such option{_meant(option, names)}" for option in options)

    def error(self, message: str) -> NoReturn:
        """Says what is wrong and where help is, and exits with 2."""
        self.exit(EXIT_USAGE, f"{self.prog}: {' '.join(message.split())} (see `{self.prog} --help`)\n")


def _meant(option: str, names: list[str]) -> str:
    return "".join(f"; did you mean {name}?" for name in difflib.get_close_matches(option, names, 1))


class Options(Protocol):
    """A group of options; argparse has no public name for it."""

    def add_argument(self, *names: str, **options: Any) -> Any:
        """Adds an option."""
        ...


class Commands(Protocol):
    """What ``add_subparsers`` returns; argparse has no public name for it."""

    def add_parser(self, name: str, **options: Any) -> Parser:
        """Adds a subcommand's parser."""
        ...


def count(text: str) -> int:
    """An integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be an integer of at least 1")
    return value


def count_or_auto(text: str) -> int | str:
    """An integer of at least 1, or ``auto``."""
    if text == "auto":
        return text
    try:
        return count(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, or auto") from None


def finite(text: str) -> float:
    """A number that is neither infinite nor nan."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r}: must be a finite number, for example 4.0")
    return value


def rate(text: str) -> float:
    """A finite number greater than 0."""
    value = finite(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r}: must be greater than 0, for example 24")
    return value


def patience(text: str) -> float:
    """A finite number of seconds, of which there may be none."""
    return 0.0 if finite(text) == 0 else rate(text)


def or_none(kind: Callable[[str], T]) -> Callable[[str], T | None]:
    """Values of this kind; or ``none``, which is to do without."""

    def read(text: str) -> T | None:
        if text.lower() == "none":
            return None
        try:
            return kind(text)
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{error}, or none") from None

    return read


def setting(text: str) -> tuple[str, Any]:
    """``KEY=VALUE``: the value is read as JSON where it is JSON, and is text otherwise."""
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r}: must read KEY=VALUE, for example max_sequence_length=128")
    try:
        read = json.loads(value)
    except (ValueError, RecursionError):
        return key, value
    if isinstance(read, float) and not math.isfinite(read):
        raise argparse.ArgumentTypeError(f"{text!r}: must be a finite number")
    return key, read


def adapter(text: str) -> tuple[str, float]:
    """``NAME_OR_PATH`` or ``NAME_OR_PATH=SCALE``: a LoRA adapter and its scale."""
    name, equals, scale = text.rpartition("=")
    if not equals:
        name, scale = text, "1"
    try:
        value = float(scale)
    except ValueError:
        name, value = text, 1.0  # the equals sign belongs to the path
    if not name or not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r}: must read NAME_OR_PATH or NAME_OR_PATH=SCALE, for example ink=0.8")
    return name, value


def step_cache(text: str) -> str:
    """A step cache, and its threshold after a colon."""
    try:
        step_caches.parse(text)
    except InvalidRequest as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("cache=")) from None
    return text


def settings_beside(**flags: str) -> Callable[[str], tuple[str, Any]]:
    """:func:`setting` for the pipeline's own arguments alone.

    Args:
        flags: Arguments that have an option of their own, and that option.
    """

    def pipelines_own(text: str) -> tuple[str, Any]:
        key, value = setting(text)
        if key in flags:
            raise argparse.ArgumentTypeError(f"{text!r}: has an option of its own; use {flags[key]} instead")
        if key in _NOT_THE_PIPELINES or key.startswith("callback"):
            why = _NOT_THE_PIPELINES.get(key, "a function cannot be given here; use the engine from Python")
            raise argparse.ArgumentTypeError(f"{text!r}: {why}")
        return key, value

    return pipelines_own


def model(text: str) -> str:
    """What ``EngineConfig.model`` takes. What looks like a path has to be there: a folder's index, a file."""
    try:
        path = expanded(text, "model")
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("model=")) from None
    looks_like_path = path.is_absolute() or text.startswith((".", "~")) or (text.count("/") > 1 and "://" not in text)
    if text == "demo" or (not path.exists() and (not looks_like_path or _in_a_repository(text))):
        return text
    if not path.is_file() and not (path / "model_index.json").is_file():
        modular = (path / "modular_model_index.json").is_file()
        why = "a modular pipeline, which is not served" if modular else "no model_index.json there"
        raise argparse.ArgumentTypeError(
            f"{text!r}: {why}; give a folder written by save_pretrained, a single-file checkpoint, "
            "a hub id, 'pkg.module:factory', or demo"
        )
    return str(path)


def _in_a_repository(text: str) -> bool:
    """Whether ``text`` is a checkpoint's name in a repository of the hub: owner/name/file.safetensors."""
    parts = pathlib.PurePosixPath(text).parts
    return bool(parts[-1].count(".")) and not text.startswith((".", "~", "/")) and not pathlib.Path(parts[0]).exists()


def engine_setting(text: str) -> tuple[str, Any]:
    """``NAME=VALUE`` of a field of ``EngineConfig``."""
    name, value = setting(text)
    fields = {field.name: field for field in dataclasses.fields(EngineConfig)}
    if name not in fields:
        nearest = difflib.get_close_matches(name, fields, n=3, cutoff=0.5) or fields
        raise argparse.ArgumentTypeError(
            f"{text!r}: EngineConfig has no such field; did you mean {' or '.join(nearest)}?"
        )
    return name, None if is_none(fields[name], value) else value


def add_command(commands: Commands, name: str, run: Command, *, summary: str, examples: str) -> Parser:
    """Adds a subcommand with the options that all have, and returns its parser."""
    parser = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", epilog=examples)
    parser.add_argument("-v", "--verbose", action="store_true", help="log what the engine does to standard error")
    parser.set_defaults(run=run)
    return parser


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that :func:`engine_config` reads."""
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--model",
        type=model,
        metavar="MODEL",
        help="a folder in diffusers layout, a hub id, a single-file checkpoint, pkg.module:factory, or demo (built in)",
    )
    group.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    group.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), help="of the weights")
    group.add_argument(
        "--backend",
        metavar="NAME",
        help="executor: mp (a worker process, the default), inproc (a thread), ray (a cluster), or pkg.mod.Class",
    )
    add_loading_options(group)


def add_loading_options(group: argparse._ActionsContainer) -> None:  # pyright: ignore[reportPrivateUsage]
    """Adds the options of :func:`engine_config` about which weights are loaded and how."""
    group.add_argument(
        "--variant", type=or_none(str), metavar="NAME", help="which weights, by the middle of their file names: fp16"
    )
    group.add_argument("--revision", type=or_none(str), metavar="NAME", help="branch, tag or commit of a hub id")
    group.add_argument("--offline", action="store_const", const=True, help="take only what is in the hub's cache")
    group.add_argument(
        "--engine",
        type=engine_setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other field of EngineConfig, as JSON where it is JSON: vae_tiling=true, group_offload=leaf_level",
    )


def is_given(arguments: argparse.Namespace, name: str) -> bool:
    """Whether an option has a value that somebody gave, be it none."""
    return getattr(arguments, name) is not None or getattr(arguments, "sources", {}).get(name, "default") != "default"


def engine_config(arguments: argparse.Namespace, **settings: Any) -> EngineConfig:
    """The engine's settings: options, then ``STEPLOOM_*`` variables, then defaults.

    Raises:
        ConfigError: A setting is wrong.
    """
    names = {"model": "model", "device": "device", "dtype": "dtype", "backend": "distributed_executor_backend",
             "variant": "variant", "revision": "revision", "offline": "local_files_only"}  # fmt: skip
    settings.update(arguments.engine)
    settings.update({field: getattr(arguments, name) for name, field in names.items() if is_given(arguments, name)})
    config = EngineConfig.from_env(**settings)
    try:
        return dataclasses.replace(config, model=model(config.model))
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"model={error}") from None
