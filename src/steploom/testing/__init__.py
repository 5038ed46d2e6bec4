"""For the tests of your application, and of your executor.

An engine like the real one that answers in milliseconds, without torch::

    from steploom.testing import FakeEngine

    async def test_my_app():
        async with FakeEngine() as engine:
            out = await engine.generate("a red circle", seed=1, num_inference_steps=4)
            assert out.images[0].size == (64, 64)

Requests are validated, queued, scheduled, streamed, cancelled and timed out by the real engine; only the model is not
there. The same request and seed give the same picture. With ``engine.hold()`` nothing goes on until
``engine.release(ticks)``: so a test says when a step happens, and sleeps for nothing. ``engine.die()`` is the worker's
death. :class:`FakeDiffusionEngine` is the blocking twin.

:func:`check_executor` tells whether an executor of yours keeps the contract::

    from steploom.testing import check_executor

    async def test_my_executor():
        await check_executor(MyExecutor)
"""

from __future__ import annotations

from steploom.testing.conformance import check_executor
from steploom.testing.engines import FAIL, FakeDiffusionEngine, FakeEngine

__all__ = ["FAIL", "FakeDiffusionEngine", "FakeEngine", "check_executor"]
