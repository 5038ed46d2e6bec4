"""A worker keeps the memory of freed tensors, and its garbage collector does not walk over the model."""

import gc
import platform
import subprocess
import sys
import weakref
from typing import Any

import pytest

from steploom import AsyncDiffusionEngine, EngineConfig

FORWARDS = """
import resource, sys
import torch
from steploom.worker.memory import keep_freed
if sys.argv[1] == "kept":
    assert keep_freed()
def forward():
    [torch.ones(size << 18) for size in (40, 4, 12)]  # MiB; each is freed before the next forward
for _ in range(3):
    forward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    forward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_freed_memory_is_used_again() -> None:
    def faults(how: str) -> int:
        command = [sys.executable, "-c", FORWARDS, how]
        return int(subprocess.run(command, capture_output=True, check=True, text=True, timeout=60).stdout)

    pages = 10 * (40 << 20) // 4096
    assert faults("as it is") > pages / 2, "this C library keeps it by itself: keep_freed() may go"
    assert faults("kept") < pages / 4


class Frozen:
    """A worker extension that tells what the garbage collector leaves alone."""

    runner: Any

    def watch(self) -> int:
        """Objects that are left alone; remembers the denoiser."""
        self.denoiser = weakref.ref(self.runner.pipeline.transformer)
        return gc.get_freeze_count()

    def left(self) -> tuple[int, bool]:
        """How many are left alone now, and whether that denoiser is still there."""
        return gc.get_freeze_count(), self.denoiser() is not None


@pytest.mark.slow
async def test_the_model_is_not_walked_over_by_the_garbage_collector_until_it_is_dropped() -> None:
    config = EngineConfig(model="demo", worker_extension=f"{__name__}.Frozen")
    async with AsyncDiffusionEngine(config) as engine:
        assert await engine.collective_rpc("watch", unique_reply_rank=0) > 100_000
        await engine.sleep(level=2)
        frozen, held = await engine.collective_rpc("left", unique_reply_rank=0)
        assert frozen < 1000
        assert not held, "what was dropped while it was frozen is never collected"
        await engine.wake_up()
        assert (await engine.collective_rpc("left", unique_reply_rank=0))[0] > 100_000
