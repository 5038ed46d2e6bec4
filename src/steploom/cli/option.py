"""One option of a command as a setting: what it is called, and how its values are read."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

from steploom.config import EngineConfig
from steploom.errors import ConfigError

Source = Literal["command line", "environment", "file", "default"]

PREFIX = "STEPLOOM_"
FILE = "config"
"""The option that names the file; it alone cannot stand in it."""

ENGINE = "engine"
"""The option, and the table of the file, with any other field of ``EngineConfig``; each field is a setting."""

FIELDS = {"max_queue": "max_waiting", "max_queue_seconds": "max_waiting_s", "backend": "distributed_executor_backend",
          "offline": "local_files_only", "lora_model": "loras"}  # fmt: skip
"""Options that are called otherwise than the field of ``EngineConfig`` that they set."""

MASK = "********"
"""What is shown of a secret."""

_SECRET = re.compile(r"(^|_)((api|admin)_keys?|token|passwords?|secrets?)$")
TRUTH = {**dict.fromkeys(("1", "true", "yes", "on"), True), **dict.fromkeys(("0", "false", "no", "off"), False)}
ENGINE_FIELDS = tuple(field.name for field in dataclasses.fields(EngineConfig))


def is_secret(name: str) -> bool:
    """Whether the value of an option must not be shown."""
    return _SECRET.search(name) is not None


@dataclasses.dataclass(frozen=True)
class Option:
    """An option that the environment and the file may set.

    Attributes:
        name: As in the file and in the parsed arguments.
        action: argparse's.
        default: Its own.
    """

    name: str
    action: argparse.Action
    default: Any

    @property
    def kind(self) -> Literal["flag", "list", "value"]:
        """What it takes: nothing, several values, or one."""
        if self.action.nargs == 0 or isinstance(self.action, argparse.BooleanOptionalAction):
            return "flag"
        several = isinstance(self.default, list) or self.action.nargs not in (None, "?")
        return "list" if several else "value"

    @property
    def variables(self) -> tuple[str, ...]:
        """Of the environment, the first that is set counts."""
        names = dict.fromkeys((self.name, FIELDS.get(self.name, self.name)))
        return tuple(PREFIX + name.upper() for name in names)

    def flag(self, on: bool) -> Any:
        """The value of a flag that is given, or is not."""
        if isinstance(self.action, argparse.BooleanOptionalAction):
            return on
        given = getattr(self.action, "const", None)
        return (True if given is None else given) if on else (False if self.default is None else self.default)

    def read(self, text: str) -> Any:
        """One value, as on the command line.

        Raises:
            ConfigError: What is wrong with it.
        """
        try:
            value = cast("Callable[[str], Any]", self.action.type or str)(text)
        except (argparse.ArgumentTypeError, TypeError, ValueError) as error:
            known = isinstance(error, argparse.ArgumentTypeError)
            why = str(error).removeprefix(f"{text!r}: ") if known else "is of the wrong kind"
            raise ConfigError(why) from None
        if self.action.choices is not None and value not in self.action.choices:
            raise ConfigError(f"must be one of {', '.join(map(str, self.action.choices))}")
        return value


@dataclasses.dataclass(frozen=True)
class Layers:
    """The options of a command, whose parser says only what the command line said.

    Attributes:
        options: By name.
    """

    options: Mapping[str, Option]

    def near(self, name: str) -> str:
        """The options, or fields of the engine, that are spelt most alike."""
        known = [option for option in self.options if option != FILE]
        nearest = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
        return f"did you mean {' or '.join(nearest)}?" if nearest else f"there are {', '.join(known)}"
