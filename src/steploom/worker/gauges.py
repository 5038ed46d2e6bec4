"""Gauges: the memory that a worker's ticks take, and what there is for requests. They measure and decide nothing."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch

from steploom.config import EngineConfig
from steploom.protocol import RunnerOutput
from steploom.worker.residents import Resident

_MEMINFO = Path("/proc/meminfo")

EVERY = 64
"""Ticks between two looks at what there is: a look costs as much as a small tick's bookkeeping."""


class Gauge:
    """Measures nothing: for devices that do not say."""

    def __init__(self) -> None:
        self._ticks = 0

    def begin(self) -> None:
        """A tick begins."""

    def end(self, result: RunnerOutput, residents: Iterable[Resident]) -> None:
        """The tick is done, and those are left: notes in its answer what was measured."""
        if self._ticks % EVERY == 0:
            result.room_bytes = self.room(residents)
        self._ticks += 1

    def room(self, residents: Iterable[Resident] = ()) -> int:
        """Bytes that there are for requests, with what these hold already; 0 if nobody can say."""
        free = self._free()
        return 0 if free is None else max(1, free + sum(resident.program.holdings.nbytes for resident in residents))

    def _free(self) -> int | None:
        return None


class HostGauge(Gauge):
    """Of a CPU: what the system can still give. Nobody says what a tick took at its peak."""

    def _free(self) -> int | None:
        return available_bytes()


class Cuda(Protocol):
    """What a gauge asks of ``torch.cuda``."""

    def mem_get_info(self, device: torch.device, /) -> tuple[int, int]:
        """Free and total bytes of the device."""
        ...

    def memory_allocated(self, device: torch.device, /) -> int:
        """Bytes of tensors."""
        ...

    def max_memory_allocated(self, device: torch.device, /) -> int:
        """The most of them since the last reset."""
        ...

    def memory_reserved(self, device: torch.device, /) -> int:
        """Bytes that torch has from the device, for tensors and cached."""
        ...

    def reset_peak_memory_stats(self, device: torch.device, /) -> None:
        """The most is what there is now."""
        ...


class CudaGauge(Gauge):
    """Of a CUDA device, as torch's allocator counts: that needs no synchronisation, since it counts on the host.

    Args:
        device: Which one.
        cuda: ``torch.cuda``.
    """

    def __init__(self, device: torch.device, cuda: Cuda) -> None:
        super().__init__()
        self._device = device
        self._cuda = cuda
        self._before = 0

    def begin(self) -> None:
        """A tick begins: its peak is counted from here."""
        self._cuda.reset_peak_memory_stats(self._device)
        self._before = self._cuda.memory_allocated(self._device)

    def end(self, result: RunnerOutput, residents: Iterable[Resident]) -> None:
        """The tick is done, and those are left: notes in its answer its peak, and now and then what there is."""
        result.peak_bytes = max(0, self._cuda.max_memory_allocated(self._device) - self._before)
        super().end(result, residents)

    def _free(self) -> int | None:
        free, _ = self._cuda.mem_get_info(self._device)
        return free + self._cuda.memory_reserved(self._device) - self._cuda.memory_allocated(self._device)


def gauge_of(device: torch.device, config: EngineConfig) -> Gauge:
    """What measures the memory of ``device``, if anything is decided by it."""
    if config.memory_share is None:
        return Gauge()
    if device.type == "cuda":
        return CudaGauge(device, torch.cuda)
    return HostGauge() if device.type == "cpu" else Gauge()


def available_bytes() -> int | None:
    """Bytes that the system can give to processes without swapping; None where it does not say (Linux does)."""
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return None
    found = next((line.split() for line in lines if line.startswith("MemAvailable:")), None)
    return None if found is None else int(found[1]) * 1024
