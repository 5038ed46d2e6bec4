"""How ``steploom serve`` ends: the first signal drains, a second one stops at once. Imported where it is needed."""

from __future__ import annotations

import asyncio
from types import FrameType

import anyio
import uvicorn

from steploom import AsyncDiffusionEngine
from steploom.server.state import ServerState
from steploom.server.telemetry import logs


class Server(uvicorn.Server):
    """uvicorn's server, which goes on listening while it drains: new requests are told so, and health can be asked.

    Args:
        config: Of uvicorn.
        state: Says that the server drains.

    Attributes:
        draining: Set by the first signal.
        stopping: Set by the second one.
        exit_code: Of the process.
    """

    def __init__(self, config: uvicorn.Config, state: ServerState) -> None:
        super().__init__(config)
        self.draining = anyio.Event()
        self.stopping = anyio.Event()
        self.exit_code = 0
        self._state = state
        self._loop = asyncio.get_running_loop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Takes a signal, between any two instructions of the main thread."""
        if self._state.draining:
            self.force_exit, self.exit_code = True, 128 + sig
            self._loop.call_soon_threadsafe(self.stopping.set)
            return
        self._state.draining = True
        if len(self._state.running):
            logs.say(f"finishing {len(self._state.running)} requests; once more to stop at once")
        self._loop.call_soon_threadsafe(self.draining.set)


async def drain(engine: AsyncDiffusionEngine, state: ServerState, server: Server, timeout_s: float) -> None:
    """Once told to, lets what runs end; what takes too long is told that the server was shut down."""
    await server.draining.wait()
    if engine.paused:
        await engine.resume()  # what is to end has to go on
    with anyio.move_on_after(timeout_s):
        await state.running.emptied()
    state.channels.feed.close()  # pages that watch are connections that would not end
    if len(state.running):
        await engine.close()
    server.should_exit = True


async def stop_now(server: Server, scope: anyio.CancelScope) -> None:
    """Ends everything once told so."""
    await server.stopping.wait()
    scope.cancel()
