"""What can be called in a worker by name: a few methods of the runner, and the user's extension."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from steploom.errors import ConfigError, GenerationFailed, InvalidRequest, raised
from steploom.weave import exits

if TYPE_CHECKING:
    from steploom.worker.runner import Runner

OWN = ("stats", "sleep", "wake_up")


class Extensions:
    """Dispatches collective RPCs.

    Args:
        runner: Whose methods are offered; the extension finds it as ``self.runner`` (and ``self.runner.pipeline``).
        name: ``"pkg.module.Class"`` of the extension, or None.

    Raises:
        ConfigError: The extension does not import.
    """

    def __init__(self, runner: Runner, name: str | None) -> None:
        self._runner = runner
        self._extension: Any = None
        if name is not None:
            self._extension = _load(name)()
            self._extension.runner = runner

    def call(self, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Calls ``method``; the extension's methods come first.

        Raises:
            InvalidRequest: There is no public method of that name.
            GenerationFailed: The extension's raised what is no ``Exception``, and no signal's.
        """
        if method == "ping":
            return "pong"
        if not method.startswith("_") and callable(getattr(self._extension, method, None)):
            try:
                return getattr(self._extension, method)(*args, **kwargs)
            except BaseException as fault:
                if not exits.is_strangers(fault):
                    raise
                raise GenerationFailed(raised(fault)) from fault
            finally:
                self._runner.forget_weights()  # it may have changed them
        if method in OWN:
            return getattr(self._runner, method)(*args, **kwargs)
        offered = sorted({*OWN, "ping", *_methods(self._extension)})
        raise InvalidRequest(f"method={method!r}: this worker offers {', '.join(offered)}", field="method")


def _methods(extension: Any) -> list[str]:
    """What can be called of it by name. Its properties are not asked."""
    own: dict[str, Any] = getattr(extension, "__dict__", {})
    return [
        name
        for name in dir(extension)
        if not name.startswith("_") and callable(own.get(name) or getattr(type(extension), name, None))
    ]


def _load(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"worker_extension={name!r}: must be 'pkg.module.Class' ({error})") from None
