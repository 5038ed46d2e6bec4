"""Faults of the machine, as torch and its libraries tell them: a lack of memory, what to free then, and other ones."""

from __future__ import annotations

import gc
import re
import time
import traceback

import torch

from steploom.errors import words_of

_SAYS_SO = re.compile(
    r"out[ _]of[ _](device_|host_)?memory|(can't|cannot|could not|unable to) allocate|not enough memory|bad_?alloc\b"
    r"|alloc(ation)?[ _]?failed",
    re.IGNORECASE,
)
"""Of CUDA and other devices; of torch's allocators for the CPU; of C++; of cuBLAS, cuDNN and their kin."""

_ALL_AFTER_S = 10.0

_NAMES_A_DEVICE = re.compile(r"(?<![a-z])(?i:cuda|cudnn|cublas|nccl)|\b(HIP|MPS)\b")
"""What a device's libraries call themselves in all that they say."""


class _Sweeps:
    """When all objects of the process were last looked through for cycles that nobody holds."""

    def __init__(self) -> None:
        self._last = -_ALL_AFTER_S

    def generation(self) -> int:
        """How old objects may be that are looked at now: all of them if that is long ago, else the younger ones."""
        now = time.monotonic()
        if now - self._last < _ALL_AFTER_S:
            return 1
        self._last = now
        return 2


_sweeps = _Sweeps()


def is_of_machine(fault: BaseException) -> bool:
    """Whether it was neither what was asked for nor the model, but the memory or the device."""
    return is_out_of_memory(fault) or _NAMES_A_DEVICE.search(words_of(fault)) is not None


def is_out_of_memory(fault: BaseException) -> bool:
    """Whether there was no memory: by its type, or by its words, since most of what allocates has no type for it."""
    if isinstance(fault, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(fault, (RuntimeError, OSError)) and _SAYS_SO.search(words_of(fault)) is not None


def make_room(fault: Exception) -> None:
    """Frees what a forward held that ran out of memory, so that another one may have it. Nothing after other faults.

    The frames of its traceback, and of what it came from, have all that was computed: they lose it, not their lines.
    What is left in cycles is young. All that the process has is looked through only now and then: no other thread
    runs meanwhile, which takes a third of a second where half a million objects are.
    """
    if not is_out_of_memory(fault):
        return
    held: BaseException | None = fault
    while held is not None:
        traceback.clear_frames(held.__traceback__)
        held = held.__context__
    gc.collect(_sweeps.generation())
    torch.cuda.empty_cache()  # cuBLAS and cuDNN get nothing of what torch's allocator keeps; without CUDA it is nothing
