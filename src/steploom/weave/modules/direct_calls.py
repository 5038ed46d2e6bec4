"""Whether the application is calling its pipeline itself, in another thread: it may set things for a while."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

from steploom.weave import untyped


def called_elsewhere(modules: Sequence[Any]) -> bool:
    """Whether another thread runs a method of a pipeline that holds one of these modules.

    No trace is left on a pipeline that is called, so it is looked for on the threads' stacks.
    """
    here = threading.get_ident()
    return any(
        _within(frame, modules)
        for thread, frame in sys._current_frames().items()  # pyright: ignore[reportPrivateUsage]
        if thread != here
    )


def _within(frame: FrameType | None, modules: Sequence[Any]) -> bool:
    while frame is not None:
        if frame.f_code.co_varnames[:1] == ("self",):
            owner: Any = frame.f_locals.get("self")
            if untyped.is_pipeline(owner) and any(one is held for one in modules for held in vars(owner).values()):
                return True
        frame = frame.f_back
    return False
