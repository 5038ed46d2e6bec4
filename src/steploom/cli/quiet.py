"""Quiet: no bars of what loads in this process, where a command has the terminal for its own progress."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Generator
from typing import Any

from steploom.config import EngineConfig


@contextlib.contextmanager
def bars(config: EngineConfig) -> Generator[None]:
    """While this is entered, loading a model in this process shows no bars. What workers show is nobody's to see."""
    quieted: list[Any] = []
    try:
        if config.distributed_executor_backend == "inproc":
            for library in ("diffusers", "transformers"):
                chatter: Any = importlib.import_module(f"{library}.utils.logging")
                if chatter.is_progress_bar_enabled():
                    chatter.disable_progress_bar()
                    quieted.append(chatter)
        yield
    finally:
        for chatter in quieted:
            chatter.enable_progress_bar()
