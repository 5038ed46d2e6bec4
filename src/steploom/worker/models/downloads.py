"""Progress of downloads from the hub, and of the components that a pipeline is made of, as lines of text.

diffusers and huggingface_hub show progress by bars on standard error. Here the bars of whoever listens become lines;
everybody else's stay as they are.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import io
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

from tqdm.std import tqdm

from steploom.weave import untyped

STEP = 5
"""Percent of the bytes, at least, between two lines."""


class Listener:
    """Whoever is told about the loading that goes on.

    Args:
        tell: Is told a line; by one thread at a time, but not always by the same.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._lock = threading.Lock()
        self._what, self._reached = "", (0, 0)

    def bars_for(self, what: str) -> type[tqdm[Any]]:
        """A class of progress bars, as huggingface_hub takes it, for the download of ``what``."""
        with self._lock:
            self._what, self._reached = what, (0, 0)

        moved = self._moved

        class Bar(tqdm):  # pyright: ignore[reportMissingTypeArgument] - it is not subscriptable when it runs
            def __init__(self, *args: Any, **options: Any) -> None:
                options.pop("name", None)
                super().__init__(*args, **{**options, "file": io.StringIO(), "disable": False, "bar_format": None})

            def display(self, msg: str | None = None, pos: int | None = None) -> None:
                if self.unit == "B" and self.total:
                    moved(int(self.n), int(self.total))

        return Bar

    def _moved(self, done: int, total: int) -> None:
        """``done`` of ``total`` bytes are here; the total grows as files begin."""
        with self._lock:
            before = self._reached
            grown = done - before[0] >= total * STEP / 100
            if done > before[0] and (grown or done >= total):
                self._reached = (done, total)
                self._tell(f"downloading {self._what}: {100 * min(done, total) // total}% of {_size(total)}")

    def components(self, items: Iterable[Any]) -> Iterator[Any]:
        """The components that diffusers loads, one after the other."""
        every = list(items)
        for place, (name, kind) in enumerate(every, 1):
            with self._lock:
                self._tell(f"loading {name} ({kind[-1]}), {place} of {len(every)}")
            yield name, kind


_current: contextvars.ContextVar[Listener | None] = contextvars.ContextVar("steploom_listener", default=None)


@contextlib.contextmanager
def told(tell: Callable[[str], None]) -> Generator[None]:
    """While this is entered, what this thread loads is told to ``tell``."""
    _install()
    before = _current.set(Listener(tell))
    try:
        yield
    finally:
        _current.reset(before)


@functools.cache
def _install() -> None:
    """Puts a word in, once, where diffusers downloads and where it goes through components."""
    for place, name in untyped.DOWNLOADS:
        module = importlib.import_module(place)
        setattr(module, name, _with_bars(getattr(module, name)))
    logging = importlib.import_module(untyped.BARS[0])
    setattr(logging, untyped.BARS[1], _Components(getattr(logging, untyped.BARS[1])))


def _with_bars(download: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(download)
    def downloads(repository: str, *args: Any, **options: Any) -> Any:
        listener = _current.get()
        if listener is not None and not options.get("local_files_only"):
            options.setdefault("tqdm_class", listener.bars_for(str(repository)))
        return download(repository, *args, **options)

    return downloads


class _Components:
    """diffusers' own maker of progress bars, but for those who listen."""

    def __init__(self, original: Any) -> None:
        self._original = original

    def __call__(self, *args: Any, **options: Any) -> Any:
        listener = _current.get()
        if listener is None or "components" not in str(options.get("desc")):
            return self._original(*args, **options)
        return listener.components(args[0])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
