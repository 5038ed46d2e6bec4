"""Recording of forwards as CUDA graphs (:class:`torch.cuda.CUDAGraph`), all in one pool of memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_WARM_UPS = 2
"""Runs before the recording: kernels are compiled, chosen and given their workspaces in these."""


class CudaRecording:
    """One CUDA graph.

    Args:
        graph: Recorded.
        nbytes: What its recording took from the device.
        released: Is told when it goes.
    """

    def __init__(self, graph: torch.cuda.CUDAGraph, nbytes: int, released: Callable[[], None]) -> None:
        self.nbytes = nbytes
        self._graph = graph
        self._released = released

    def replay(self) -> None:
        """Enqueues the graph on the current stream."""
        self._graph.replay()

    def release(self) -> None:
        """Gives its memory back, once the device is done with it."""
        torch.cuda.synchronize()
        self._graph.reset()
        self._released()


class CudaRecorder:
    """Records on a CUDA device.

    Graphs share one pool: their results are copied out after each replay, so none has to survive another's.

    Args:
        device: Where the modules are.
    """

    def __init__(self, device: torch.device) -> None:
        given: Any = device.index  # torch's stubs know no None
        self.device = torch.device("cuda", torch.cuda.current_device() if given is None else given)
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None
        self._held = 0

    def record(self, run: Callable[[], Any]) -> tuple[CudaRecording, Any]:
        """Runs ``run`` on a stream of its own until it is settled, then records it.

        Raises:
            RuntimeError: It does something that cannot be recorded, such as waiting for the device.
        """
        with torch.cuda.device(self.device):
            if self._stream is None:
                self._stream = torch.cuda.Stream(self.device)
            stream, current = self._stream, torch.cuda.current_stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    run()
            current.wait_stream(stream)
            torch.cuda.synchronize()
            before = torch.cuda.memory_reserved()
            graph = torch.cuda.CUDAGraph()
            # Other threads of an application may use CUDA meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                result = run()
            torch.cuda.synchronize()
        self._pool, self._held = graph.pool(), self._held + 1
        return CudaRecording(graph, max(0, torch.cuda.memory_reserved(self.device) - before), self._gone), result

    def _gone(self) -> None:
        self._held -= 1
        if not self._held:
            self._pool = None  # a pool without graphs is given back, and must not be asked for again
