"""Which way text encoders and VAEs run beside the ticks of a worker."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from steploom.config import AsideMode
from steploom.weave.aside.aside import Aside, SideThread
from steploom.weave.aside.slices import Slices
from steploom.weave.aside.streams import SideStream
from steploom.weave.batching.batches import Group


def make_aside(mode: AsideMode, device: torch.device, answer: Callable[[Group], None]) -> Aside:
    """What runs them on ``device``, where ``answer`` answers a group of calls. Asks torch for its number of threads."""
    if mode == "off" or device.type not in ("cpu", "cuda"):
        return Aside(answer)
    if device.type == "cuda":
        return SideThread(answer, SideStream(device))
    spare = cores() - torch.get_num_threads()
    if mode == "slices" or (mode == "auto" and spare < 1):
        return Slices(answer)
    return SideThread(answer, threads=max(1, spare) if spare < torch.get_num_threads() else None)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
