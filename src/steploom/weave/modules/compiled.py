"""Compiled code under the hub: compilations are counted, timed, told and bounded, and none that fails hurts a request.

Regional compilation is diffusers' ``compile_repeated_blocks``; the compiler is ``torch.compile``'s.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import nn

from steploom.weave.machine_faults import is_out_of_memory

log = logging.getLogger(__name__)

_WHERE_FROM = {"eager_on_recompile": "what is new to it", "force_eager": "everything"}
"""What runs uncompiled under which of torch's stances."""


def is_compiled(module: Any) -> bool:
    """Whether ``torch.compile`` has been applied to a module, or to a part of it (regional compilation)."""
    if not isinstance(module, nn.Module):
        return False
    return hasattr(module, "_orig_mod") or any(
        part.__dict__.get("_compiled_call_impl") is not None or hasattr(part, "_orig_mod") for part in module.modules()
    )


def _laid_out(value: Any) -> Any:
    """An argument as merging lays it out: a pipeline's expanded timestep would need code of its own."""
    if isinstance(value, torch.Tensor) and value.layout is torch.strided and 0 in value.stride():
        return value.clone(memory_format=torch.contiguous_format)
    return value


class Compilation:
    """What a worker compiles. All of it on the worker's thread; what other threads compile meanwhile is not counted.

    Args:
        tell: Hears of every compilation as it begins, since it makes a tick longer than others.
        limit: Compilations in all; what would need one more runs uncompiled. None: torch's own bounds.

    Attributes:
        count: Compilations so far, of functions for kinds of inputs.
        seconds: Spent on them.
        uncompiled: Why some, or all, runs uncompiled; None as long as nothing does.
    """

    def __init__(self, tell: Callable[[str], None] = lambda line: None, limit: int | None = None) -> None:
        self.count = 0
        self.seconds = 0.0
        self.uncompiled: str | None = None
        self._tell = tell
        self._limit = limit
        self._stance: str | None = None
        self._began: float | None = None
        self._thread = 0
        self._name = ""

    def around(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        """``run``, a compiled module that is called ``name``, under these rules."""
        return functools.partial(self._run, name, run)

    def _run(self, name: str, run: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = tuple(map(_laid_out, args)), {key: _laid_out(value) for key, value in kwargs.items()}
        if self._stance is not None:
            with torch.compiler.set_stance(self._stance):
                return run(*args, **kwargs)
        self._name, before = name, self.count
        try:
            with self._watched():
                return run(*args, **kwargs)
        except Exception as fault:
            if self._began is None and self.count == before:
                raise  # nothing was compiled: the module's own fault
            if is_out_of_memory(fault):
                raise
            return self._instead(name, fault, run, args, kwargs)
        finally:
            self._finished()
            if self._limit is not None and self.count >= self._limit and self._stance is None:
                more = f"max_compilations={self._limit} are done"
                self._give_up("eager_on_recompile", f"{more}; raise it, or serve fewer kinds of requests")

    def _instead(
        self, name: str, fault: Exception, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The same uncompiled. If that works, the compiler was at fault, and is not asked again."""
        with torch.compiler.set_stance("force_eager"):
            result = run(*args, **kwargs)
        words = " ".join(str(fault).split())[:300]
        self._give_up("force_eager", f"{name} could not be compiled ({type(fault).__name__}: {words})")
        return result

    def _give_up(self, stance: str, why: str) -> None:
        self._stance, self.uncompiled = stance, f"{_WHERE_FROM[stance]} runs uncompiled: {why}"
        log.warning("%s", self.uncompiled)
        self._tell(self.uncompiled)

    @contextlib.contextmanager
    def _watched(self) -> Generator[None]:
        """Counts what is compiled within. Equal sizes are no promise: of two dimensions, nor of two calls."""
        from torch._dynamo.callback import callback_handler
        from torch.fx.experimental import _config as shapes

        self._thread = threading.get_ident()
        callback_handler.start_callbacks.append(self._started)
        callback_handler.end_callbacks.append(self._ended)
        try:
            with shapes.patch(use_duck_shape=False):  # pyright: ignore[reportAttributeAccessIssue]
                yield
        finally:
            callback_handler.start_callbacks.remove(self._started)
            callback_handler.end_callbacks.remove(self._ended)

    def _started(self, *about: object) -> None:
        if threading.get_ident() == self._thread and self._began is None:
            self._began = time.perf_counter()
            at_most = "" if self._limit is None else f" of at most {self._limit}"
            self._tell(f"compiling {self._name}, compilation {self.count + 1}{at_most}")

    def _ended(self, *about: object) -> None:
        if threading.get_ident() == self._thread and self._began is not None:
            self.count += 1
            self._finished()

    def _finished(self) -> None:
        """Stops the clock, also of a compilation that failed."""
        if self._began is not None:
            self.seconds += time.perf_counter() - self._began
            self._began = None
