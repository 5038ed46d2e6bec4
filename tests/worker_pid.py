"""What tests ask a worker for."""

from __future__ import annotations

import os


class Pid:
    """An extension of workers."""

    def pid(self) -> int:
        """Of the worker's process."""
        return os.getpid()

    def echo(self, *args: object, **kwargs: object) -> list[object]:
        """What it was given."""
        return [list(args), kwargs]
