"""The stream beside that of the ticks on a CUDA device, and the tensors that cross to it and back."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable
from typing import Any

import torch


class SideStream:
    """A stream beside the one on which ticks run. The ticks' host never waits for it.

    Args:
        device: The CUDA device.
        cuda: ``torch.cuda``, or what stands in for it.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self._device, self._cuda = device, cuda
        self._stream: Any = cuda.Stream(device)

    def mark(self) -> Any:
        """What the current stream was told so far: work on this stream comes after it. For the hub's thread."""
        event = self._cuda.Event()
        event.record(self._cuda.current_stream(self._device))
        return event

    @contextlib.contextmanager
    def entered(self, marks: Iterable[Any], given: Iterable[torch.Tensor]) -> Generator[None]:
        """Work within runs on this stream, after ``marks``; leaving waits until it is done, and does not spin.

        Args:
            marks: What :meth:`mark` has returned.
            given: What is read, in memory that belongs to the other stream.
        """
        with self._cuda.stream(self._stream):
            for mark in marks:
                self._stream.wait_event(mark)
            for tensor in given:
                if tensor.is_cuda:
                    tensor.record_stream(self._stream)
            try:
                yield
            finally:
                done = self._cuda.Event(blocking=True)
                done.record(self._stream)
                done.synchronize()

    def taken_back(self, found: Iterable[torch.Tensor]) -> None:
        """The current stream will read ``found``, in memory that belongs to this stream."""
        current = self._cuda.current_stream(self._device)
        for tensor in found:
            if tensor.is_cuda:
                tensor.record_stream(current)
