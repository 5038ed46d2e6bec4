"""How much memory a worker holds. Imports no torch: a worker that has a device has it loaded."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

_STATM = Path("/proc/self/statm")


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
