"""Slices: what runs beside the ticks where no core is to spare gets a bounded share of each tick's time.

It runs on a greenlet of its own that stops between two operations of torch when its time is over. One large convolution
is one operation.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import greenlet
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from steploom.weave.aside.aside import Aside, Errand


class Slices(Aside):
    """Runs what is under way on the hub's thread, when it is given time.

    Args:
        answer: As :class:`~steploom.weave.aside.aside.Aside`'s.
    """

    takes_any = True

    def __init__(self, answer: Callable[..., None]) -> None:
        super().__init__(answer)
        self._greenlet: greenlet.greenlet | None = None
        self._until = 0.0

    def spend(self, seconds: float) -> bool:
        """Runs what is under way for so many seconds, or until something is done; whether anything is."""
        self._until = time.perf_counter() + seconds
        # It may be called by a program that has switched these on: modes belong to the thread.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
            while self.working and not self._done:
                self._go_on()
                if time.perf_counter() >= self._until:
                    break
        return bool(self._done)

    def settle(self) -> None:
        """Runs all that is under way to its end."""
        self._until = float("inf")
        with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
            while self.working:
                self._go_on()

    def _go_on(self) -> None:
        if self._greenlet is None:
            self._greenlet = greenlet.greenlet(self._sliced)
            self._greenlet.aside = True  # pyright: ignore[reportAttributeAccessIssue]
            self._greenlet.switch(self._pick())
        else:
            self._greenlet.parent = greenlet.getcurrent()
            self._greenlet.switch()
        if self._greenlet.dead:
            self._greenlet = None
            self._ended()

    def _sliced(self, running: list[Errand]) -> None:
        with _Stops(self):
            self._perform(running)

    def pause(self) -> None:
        """Stops here until there is time again, if it is over."""
        if time.perf_counter() < self._until:
            return
        # What the module has switched on must not be on for others.
        if torch.is_grad_enabled() or torch.is_inference_mode_enabled() or torch.is_autocast_enabled("cpu"):
            return
        hub = greenlet.getcurrent().parent
        assert hub is not None
        hub.switch()


class _Stops(TorchFunctionMode):
    """Stops after an operation of torch. The mode is off while that is handled, and so for whoever runs meanwhile."""

    def __init__(self, slices: Slices) -> None:
        super().__init__()
        self._slices = slices

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs ``func``."""
        result = func(*args, **(kwargs or {}))
        if func is not functional.scaled_dot_product_attention:  # backends are chosen for the process, around this call
            self._slices.pause()
        return result
