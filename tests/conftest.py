"""Fixtures for all tests."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import pytest_asyncio

# A shell that starts us in the background has us ignore Ctrl-C, and every process that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# The same examples in every run: what is green stays green. `nox -s search` looks for others, ten times as many.
hypothesis.settings.register_profile("steady", deadline=None, derandomize=True, max_examples=100)
hypothesis.settings.register_profile("search", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("steady")


@pytest.fixture(scope="session", autouse=True)
def own_states(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What engines keep for their next start is kept for no other run of the tests."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("states"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that ``EngineConfig(model=...)`` takes: a random-weight Stable Diffusion 3, small enough to be quick."""
    import tiny  # imports torch and diffusers, which most tests do without

    folder = tmp_path_factory.mktemp("tiny-sd3")
    tiny.sd3().save_pretrained(folder)
    return folder


async def _real(model: Path, backend: str) -> AsyncIterator[Any]:
    from steploom import AsyncDiffusionEngine

    config = {"distributed_executor_backend": backend, "max_batch": 4, "max_resident": 8, "max_waiting": 64}
    async with AsyncDiffusionEngine(model=str(model), torch_threads=1, **config) as engine:
        yield engine


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def mp_engine(tiny_model: Path) -> AsyncIterator[Any]:
    """A running engine over a worker process, for tests of ``loop_scope="session"``; at most 4 share a tick."""
    async for engine in _real(tiny_model, "mp"):
        yield engine


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def inproc_engine(tiny_model: Path) -> AsyncIterator[Any]:
    """The same over a thread of this process."""
    async for engine in _real(tiny_model, "inproc"):
        yield engine


@pytest.fixture(params=["mp", "inproc"])
def engine(request: pytest.FixtureRequest) -> Any:
    """Both of them, one after the other."""
    return request.getfixturevalue(f"{request.param}_engine")
