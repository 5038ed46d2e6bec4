"""How much memory a worker holds, and keeps. Imports no torch: a worker that has a device has it loaded."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from pathlib import Path
from typing import Any

_STATM = Path("/proc/self/statm")

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Numbers of glibc's ``malloc.h``."""

KEPT = 512 << 20
"""Bytes of freed memory that a worker keeps at most, beyond what it uses."""

LARGEST_KEPT = 64 << 20
"""Bytes of a tensor whose memory may be kept; that of larger ones goes back at once."""


def keep_freed() -> bool:
    """Has this process keep the memory of freed tensors, and use it again, as far as its C library can be told to.

    Without that glibc gives the activations of every forward back to the system and gets them anew, page by page: the
    merged forwards of the built-in model take 1.1 to 1.2 times as long.

    Returns:
        Whether it could be told: on Linux with glibc.
    """
    mallopt: Any = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_MMAP_THRESHOLD, LARGEST_KEPT) and mallopt(_TRIM_THRESHOLD, KEPT))


class Still:
    """Whether the garbage collector leaves alone what was there at some time, in this process.

    A full collection walks over all objects of torch, diffusers and the model: 0.3 s, in the middle of a tick.
    """

    def __init__(self) -> None:
        self._was_frozen = self._frozen = False

    def freeze(self) -> None:
        """What there is by now stays: the garbage collector looks at it no more."""
        gc.collect()
        gc.freeze()
        self._was_frozen = self._frozen = True

    def thaw(self) -> None:
        """What was frozen and is not used any more is collected."""
        if self._frozen:
            gc.unfreeze()
            gc.collect()
            self._frozen = False

    def freeze_again(self) -> None:
        """After :meth:`thaw`, once there is something to keep again."""
        if self._was_frozen and not self._frozen:
            self.freeze()


still = Still()
"""Of this process. Nothing is frozen in a process that is not ours."""


def held() -> dict[str, int]:
    """Bytes by kind, as :class:`~steploom.protocol.WorkerStats` lists them; without what the system does not say."""
    found: dict[str, int] = {}
    if _STATM.exists():  # Linux; elsewhere only the peak could be told
        found["host"] = int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    cuda: Any = getattr(sys.modules.get("torch"), "cuda", None)
    if cuda is not None and cuda.is_available() and cuda.is_initialized():
        found["device_allocated"] = cuda.memory_allocated()
        found["device_reserved"] = cuda.memory_reserved()
    return found
