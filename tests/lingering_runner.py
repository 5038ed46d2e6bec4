"""A scripted runner whose ranks beside rank 0 do not end by themselves.

Named to worker processes as ``lingering_runner:make``. Its model is the path of a gate.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from scripted_runner import ScriptedRunner, stand_before

from steploom.config import EngineConfig
from steploom.worker.ranks import spmd as ranks


class LingeringRunner(ScriptedRunner):
    """In rank 0 as any other."""

    gate = ""

    def rpc_hang_up(self) -> None:
        """In the others: does so, and goes on."""
        if ranks.here().index:
            ranks.here()._link._connection.close()
            threading.Event().wait()

    def close(self) -> None:
        """In the others: when its gate is opened."""
        if ranks.here().index:
            stand_before(self.gate)


def make(config: EngineConfig, progress: Callable[[str], None]) -> LingeringRunner:
    """Loads nothing."""
    ranks.here().meet()
    runner = LingeringRunner(progress)
    runner.gate = config.model
    return runner
