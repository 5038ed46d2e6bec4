"""The class of a program's own pipeline: it tells of sizes and totals, and leaves shared things alone."""

from __future__ import annotations

import functools
from collections.abc import Sized
from typing import TYPE_CHECKING, Any

from steploom.weave import untyped
from steploom.weave.laid_out import telling

if TYPE_CHECKING:
    from steploom.weave.watching import Watcher


@functools.cache
def woven_class(cls: type) -> type:
    """A subclass of a pipeline class with the same name, that leaves shared things alone."""

    def progress_bar(self: Any, iterable: Any = None, total: int | None = None, **looks: Any) -> Any:
        watcher: Watcher = self._steploom[0]
        if isinstance(iterable, Sized):
            watcher.announce(len(iterable), exact=True, by=id(self))
        else:
            watcher.announce(total, exact=False, by=id(self))
        bar = untyped.silent_progress(iterable, total)
        bar.update = lambda n=1: watcher.turned()
        return bar

    members: dict[str, Any] = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "progress_bar": progress_bar,
        "maybe_free_model_hooks": lambda self: None,
        "_execution_device": property(lambda self: self._steploom[2]),
        "device": property(lambda self: self._steploom[2]),
    }
    return type(cls.__name__, (cls,), members | telling(cls))
