"""Where things are: a user's folders, and paths that begin with a home."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping

from steploom.errors import ConfigError


def cache_folder(env: Mapping[str, str] | None = None) -> pathlib.Path:
    """Where this user's programs keep what can be made again: ``$XDG_CACHE_HOME/steploom``, or its default.

    Raises:
        ConfigError: This user has no home.
    """
    env = os.environ if env is None else env
    given = pathlib.Path(env.get("XDG_CACHE_HOME") or "")
    return (given if given.is_absolute() else expanded("~/.cache", "XDG_CACHE_HOME")) / "steploom"


def state_folder(env: Mapping[str, str] | None = None) -> pathlib.Path:
    """Where this user's programs keep what has to outlive them: ``$XDG_STATE_HOME/steploom``, or its default.

    Raises:
        ConfigError: This user has no home.
    """
    env = os.environ if env is None else env
    given = pathlib.Path(env.get("XDG_STATE_HOME") or "")
    return (given if given.is_absolute() else expanded("~/.local/state", "XDG_STATE_HOME")) / "steploom"


def expanded(path: str | pathlib.Path, field: str) -> pathlib.Path:
    """``path`` with the home that its ``~`` or ``~name`` stands for; ``field`` is the setting that gave it.

    Raises:
        ConfigError: There is no such user, or it has no home.
    """
    try:
        return pathlib.Path(path).expanduser()
    except RuntimeError:
        home = pathlib.Path(path).parts[0]
        mend = "set HOME, or give an absolute path" if home == "~" else "give the path without ~"
        raise ConfigError(f"{field}={str(path)!r}: nobody knows the home {home!r}; {mend}") from None
