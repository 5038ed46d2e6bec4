"""What the subcommands' arguments have in common: kinds of values, options of the engine, errors in one line."""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Callable
from typing import Any, NoReturn, Protocol

from steploom.config import EngineConfig
from steploom.errors import ConfigError

EXIT_USAGE = 2
Command = Callable[[argparse.Namespace], int]
"""A subcommand: takes the parsed arguments, returns the exit code."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose help keeps its line breaks and whose errors are one line."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Says what is wrong and where help is, and exits with 2."""
        self.exit(EXIT_USAGE, f"{self.prog}: {' '.join(message.split())} (see `{self.prog} --help`)\n")


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


def setting(text: str) -> tuple[str, Any]:
    """``KEY=VALUE``: the value is read as JSON where it is JSON, and is text otherwise."""
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r}: must read KEY=VALUE, for example max_sequence_length=128")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def model(text: str) -> str:
    """``demo``, a folder with a ``model_index.json``, or a hub id. What looks like a path has to be such a folder."""
    path = pathlib.Path(text).expanduser()
    looks_like_path = path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1
    if not path.exists() and not looks_like_path:
        return text
    if text == "demo":
        return text
    if not (path / "model_index.json").is_file():
        raise argparse.ArgumentTypeError(
            f"{text!r}: no model_index.json there; give a folder written by save_pretrained, a hub id, or demo"
        )
    return str(path)


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
        help="a folder in diffusers layout, a hub id, or demo (the built-in model)",
    )
    group.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    group.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), help="of the weights")
    group.add_argument(
        "--backend",
        metavar="NAME",
        help="executor: mp (a worker process, the default), inproc (a thread), or pkg.mod.Class",
    )


def engine_config(arguments: argparse.Namespace, **settings: Any) -> EngineConfig:
    """The engine's settings: options, then ``STEPLOOM_*`` variables, then defaults.

    Raises:
        ConfigError: A setting is wrong.
    """
    names = {"model": "model", "device": "device", "dtype": "dtype", "backend": "distributed_executor_backend"}
    given = {field: getattr(arguments, option) for option, field in names.items()}
    return EngineConfig.from_env(**{field: value for field, value in given.items() if value is not None}, **settings)


def check_image_file(path: pathlib.Path) -> pathlib.Path:
    """``path``, if an image can be written there.

    Raises:
        ConfigError: The ending names no image format, or the folder is not there.
    """
    from PIL import Image

    if path.suffix.lower() not in Image.registered_extensions():
        raise ConfigError(
            f"-o {path}: {path.suffix or 'no ending'!r} names no image format; use .png, .jpg, .webp or .gif"
        )
    if not path.parent.is_dir():
        raise ConfigError(f"-o {path}: the folder {str(path.parent)!r} does not exist; create it first")
    return path
