"""Forwards: how the hub runs the real modules for its calls, and what of that time was warm-up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from steploom.weave.batching.merging import MergedCall
from steploom.weave.calls import ModuleCall, has_opaque
from steploom.weave.machine_faults import is_out_of_memory, make_room


class Seconds(Protocol):
    """Where the hub adds up the time of a tick."""

    forward_s: float
    warmup_s: float


class Forwards:
    """Runs module calls as they are.

    Args:
        prepared: Seconds since the start that went into compiling and capturing.
        failed: Is told what a forward has raised, before anybody else is.
    """

    def __init__(
        self, prepared: Callable[[], float] = lambda: 0.0, failed: Callable[[Exception], None] = lambda fault: None
    ) -> None:
        self._prepared = prepared
        self.failed = failed
        self._before = 0.0

    def merged(self, merged: MergedCall, *, known: bool) -> list[Any]:
        """The results of a merged call, in the order of its calls.

        Args:
            merged: The call.
            known: Whether its kind has been verified; if not, its bits are about to be compared with other runs.
        """
        self._before = self._prepared()
        try:
            return merged.run()
        except Exception as fault:
            self.failed(fault)
            raise

    def alone(self, call: ModuleCall) -> Any:
        """The result of a call by itself. One for which there was no memory is tried again, when there is room."""
        self._before = self._prepared()
        try:
            return self._run(call)
        except Exception as fault:
            if not is_out_of_memory(fault) or has_opaque(call.structure):  # a cache, which it may have half changed
                raise
            make_room(fault)
        return self._run(call)

    def _run(self, call: ModuleCall) -> Any:
        try:
            return call.run()
        except Exception as fault:
            self.failed(fault)
            raise

    def count(self, seconds: float, into: Seconds) -> None:
        """Adds the seconds of the run that has just ended: what compiling or capturing took of them was warm-up."""
        warmup_s = min(self._prepared() - self._before, seconds)
        into.forward_s += seconds - warmup_s
        into.warmup_s += warmup_s
