"""A real pipeline with random weights whose denoiser meets with accidents. Named to workers as ``storm_model:make``."""

from __future__ import annotations

import gc
import os
import signal
import time
from pathlib import Path
from typing import Any

import greenlet
import tiny
import torch

VICTIM_STEPS = 7
"""Steps of the requests that accidents are meant for: no other request has so many, so its times tell it."""


def called_for(accident: str) -> Path:
    """The file that says so, in the folder ``STORM``; taken away by whom the accident befalls."""
    return Path(os.environ.get("STORM", "/nowhere")) / accident


def taken(accident: str) -> bool:
    """Whether it is to happen here and now."""
    try:
        called_for(accident).unlink()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


class Counts:
    """The worker's extension."""

    def greenlets(self) -> int:
        """How many there are that were not there when the model had loaded."""
        gc.collect()
        return sum(isinstance(thing, greenlet.greenlet) and not thing.dead for thing in gc.get_objects())


class Accidents:
    """Hooks of a denoiser."""

    def __init__(self, pipe: Any) -> None:
        times = {steps: self._times(pipe, steps) for steps in range(3, VICTIM_STEPS + 1)}
        victim = times.pop(VICTIM_STEPS)
        self._victim = torch.tensor(sorted(victim - set[int]().union(*times.values())))
        pipe.transformer.register_forward_pre_hook(self.before, with_kwargs=True)
        pipe.transformer.register_forward_hook(self.after, with_kwargs=True)

    @staticmethod
    def _times(pipe: Any, steps: int) -> set[int]:
        noise = type(pipe.scheduler).from_config(pipe.scheduler.config)
        noise.set_timesteps(steps)
        return {round(float(one)) for one in noise.timesteps}

    def _aimed(self, kwargs: Any) -> torch.Tensor:
        """Which rows are the victim's; no row's value is looked at by itself, or its calls would not be shared."""
        return torch.isin(kwargs["timestep"].round().long(), self._victim)

    def before(self, module: Any, args: Any, kwargs: Any) -> None:
        if taken("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        if taken("stop") or taken("revive"):
            os.kill(os.getpid(), signal.SIGSTOP)
        if taken("clock"):
            real = time.time
            time.time = lambda: real() + 1e5
        if len(kwargs["hidden_states"]) > 2 and taken("memory"):
            raise torch.OutOfMemoryError("CUDA out of memory (pretended)")
        if called_for("fault").exists() and self._aimed(kwargs).any():
            raise RuntimeError("a fault of the device (pretended)")

    def after(self, module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        if called_for("nan").exists():
            output[0][self._aimed(kwargs)] = float("nan")
        return output


def make() -> Any:
    """The pipeline."""
    pipe = tiny.sd3()
    Accidents(pipe)
    return pipe
