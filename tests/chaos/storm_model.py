"""A real pipeline with random weights whose denoiser meets with accidents. Named to workers as ``storm_model:make``."""

from __future__ import annotations

import os
import random
import signal
from typing import Any

import tiny
import torch

ODDS = {"memory": 0.01, "nan": 0.003, "fault": 0.003, "kill": 0.006, "stop": 0.002}
"""How often a forward of the denoiser meets with what."""


def make() -> Any:
    """The pipeline; its accidents differ from process to process."""
    pipe, luck = tiny.sd3(), random.Random()

    def before(module: Any, args: Any, kwargs: Any) -> None:
        if os.environ.get("STORM") != "on":
            return
        if luck.random() < ODDS["kill"]:
            os.kill(os.getpid(), signal.SIGKILL)
        if luck.random() < ODDS["stop"]:
            os.kill(os.getpid(), signal.SIGSTOP)
        if len(kwargs["hidden_states"]) > 2 and luck.random() < ODDS["memory"]:
            raise torch.OutOfMemoryError("CUDA out of memory (pretended)")
        if luck.random() < ODDS["fault"]:
            raise RuntimeError("a fault of the device (pretended)")

    def after(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        if os.environ.get("STORM") == "on" and luck.random() < ODDS["nan"]:
            output[0][-1, 0, 0, 0] = float("nan")
        return output

    pipe.transformer.register_forward_pre_hook(before, with_kwargs=True)
    pipe.transformer.register_forward_hook(after, with_kwargs=True)
    return pipe
