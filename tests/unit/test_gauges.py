"""Gauges: what the peak of a tick is, what there is for requests, and how seldom that is looked up."""

from __future__ import annotations

import dataclasses
import pathlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from steploom.config import EngineConfig
from steploom.protocol import RunnerOutput
from steploom.weave.holdings import Holdings
from steploom.worker import gauges
from steploom.worker.gauges import EVERY, CudaGauge, Gauge, HostGauge, gauge_of


@dataclasses.dataclass
class FakeCuda:
    """The counters of ``torch.cuda``, of one device."""

    free: int = 1000
    allocated: int = 300
    reserved: int = 500
    peak: int = 900
    asked: int = 0

    def mem_get_info(self, device: torch.device, /) -> tuple[int, int]:
        assert device == torch.device("cuda", 1)
        self.asked += 1
        return self.free, 2000

    def memory_allocated(self, device: torch.device, /) -> int:
        assert device == torch.device("cuda", 1)
        return self.allocated

    def memory_reserved(self, device: torch.device, /) -> int:
        assert device == torch.device("cuda", 1)
        return self.reserved

    def max_memory_allocated(self, device: torch.device, /) -> int:
        assert device == torch.device("cuda", 1)
        return self.peak

    def reset_peak_memory_stats(self, device: torch.device, /) -> None:
        assert device == torch.device("cuda", 1)
        self.peak = self.allocated


def resident(nbytes: int) -> Any:
    return SimpleNamespace(program=SimpleNamespace(holdings=SimpleNamespace(nbytes=nbytes)))


def test_on_cuda_the_peak_is_what_a_tick_took_beyond_what_was_there_before_it() -> None:
    cuda = FakeCuda()
    gauge, peaks = CudaGauge(torch.device("cuda", 1), cuda), []
    for allocated, peak, after in ((300, 450, 320), (320, 400, 300), (300, 300, 250)):
        cuda.allocated = allocated
        gauge.begin()
        cuda.peak, cuda.allocated = peak, after
        result = RunnerOutput(tick=1)
        gauge.end(result, [])
        peaks.append(result.peak_bytes)
    assert peaks == [150, 80, 0]


def test_on_cuda_there_is_what_is_free_what_is_cached_and_what_residents_hold() -> None:
    gauge = CudaGauge(torch.device("cuda", 1), FakeCuda())
    assert gauge.room() == 1000 + 500 - 300
    assert gauge.room([resident(40), resident(2)]) == 1242


def test_what_there_is_is_looked_up_in_the_first_tick_and_seldom_after_that() -> None:
    cuda = FakeCuda()
    gauge, rooms = CudaGauge(torch.device("cuda", 1), cuda), []
    for tick in range(2 * EVERY + 1):
        gauge.begin()
        result = RunnerOutput(tick=tick)
        gauge.end(result, [resident(tick)])
        rooms.append(result.room_bytes)
    assert {tick: room for tick, room in enumerate(rooms) if room} == {
        0: 1200,
        EVERY: 1200 + EVERY,
        2 * EVERY: 1200 + 2 * EVERY,
    }
    assert cuda.asked == 3


def test_on_a_cpu_there_is_what_the_system_can_give(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "meminfo"
    file.write_text("MemTotal:  9000 kB\nMemFree:  1 kB\nMemAvailable:   12 kB\nSwapFree: 5 kB\n")
    monkeypatch.setattr(gauges, "_MEMINFO", file)
    assert HostGauge().room([resident(8)]) == 12 * 1024 + 8
    file.write_text("MemTotal:  9000 kB\n")
    assert HostGauge().room([resident(8)]) == 0
    file.unlink()
    assert HostGauge().room([resident(8)]) == 0


def test_who_measures_what() -> None:
    config = EngineConfig()
    kinds = {device: type(gauge_of(torch.device(device), config)) for device in ("cuda", "cpu", "mps")}
    assert kinds == {"cuda": CudaGauge, "cpu": HostGauge, "mps": Gauge}
    for device in kinds:
        assert type(gauge_of(torch.device(device), EngineConfig(memory_share=None))) is Gauge
    assert Gauge().room([resident(8)]) == 0


def test_a_tensor_counts_once_and_a_view_as_much_as_it_shows() -> None:
    own, whole, times = torch.zeros(2, 3), torch.zeros(8, 10), torch.zeros(20)
    holdings = Holdings()
    holdings.add([own, [own, whole[2:4]], times[0].expand(2)], 0)
    assert holdings.nbytes == 24 + 80 + 8
    holdings.add([own, whole[2:4], torch.zeros(5, dtype=torch.bfloat16)], 0)
    assert holdings.nbytes == 24 + 80 + 8 + 10, "another call of the same step"
    holdings.add([whole, whole.T, torch.zeros(1, 4).expand(1000, 4)], 1)
    assert holdings.nbytes == 320 + 16
    holdings.add([torch.eye(3).to_sparse()], 2)
    assert holdings.nbytes > 0
