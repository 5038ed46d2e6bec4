"""The engine's end of a socket: what takes long to decode is decoded beside the event loop, and in order."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import zmq

from steploom import codec
from steploom.errors import ProtocolError
from steploom.executor.transport import LARGE, WorkerSocket
from steploom.worker.messages import Answer, Progress, Returned, ToEngine


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    with zmq.Context() as context:
        yield context


async def test_large_messages_are_decoded_beside_the_loop_and_in_order(
    context: zmq.Context[zmq.Socket[bytes]], temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []
    decode = codec.decode

    def seen(*args: Any, **kwargs: Any) -> Any:
        threads.append(threading.current_thread())
        return decode(*args, **kwargs)

    monkeypatch.setattr(codec, "decode", seen)
    arrived: list[Answer] = []
    ended = anyio.Event()

    def take(answer: Answer) -> None:
        arrived.append(answer)
        if len(arrived) == 7:
            ended.set()

    numbers = [float(number) for number in range(LARGE)]
    said = [Progress("a"), Returned(1, numbers), Progress("b"), Progress("c"), Returned(2, b"payload" * LARGE)]
    said += [Returned(3, numbers), Progress("d")]
    socket = WorkerSocket(context, f"{temporary}/worker", take, pytest.fail)
    try:
        with context.socket(zmq.PAIR) as worker, anyio.fail_after(20):
            worker.connect(f"ipc://{temporary}/worker")
            for answer in said:
                worker.send_multipart(codec.encode(ToEngine(answer)))
            await ended.wait()
    finally:
        socket.close()
    where = [thread is threading.main_thread() for thread in threads]
    assert where == [True, False, True, True, False, False, True]
    assert arrived == said
    assert not threads[1].is_alive()


async def test_a_message_is_decoded_though_no_thread_can_begin(
    context: zmq.Context[zmq.Socket[bytes]], temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    await _arrives(context, temporary, Returned(1, b"payload" * LARGE))


async def test_what_fails_while_a_message_is_decoded_is_told(
    context: zmq.Context[zmq.Socket[bytes]], temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise MemoryError("no room")

    monkeypatch.setattr(codec, "decode", fails)
    damage = await _arrives(context, temporary, Returned(1, b"payload" * LARGE))
    assert str(damage) == "a message cannot be decoded: MemoryError: no room"


async def _arrives(context: zmq.Context[zmq.Socket[bytes]], temporary: Path, answer: Answer) -> ProtocolError | None:
    """Returns once ``answer`` is taken; or why it cannot be decoded."""
    taken: list[Answer | ProtocolError] = []
    ended = anyio.Event()

    def take(one: Answer | ProtocolError) -> None:
        taken.append(one)
        ended.set()

    socket = WorkerSocket(context, f"{temporary}/worker", take, take)
    try:
        with context.socket(zmq.PAIR) as worker, anyio.fail_after(20):
            worker.connect(f"ipc://{temporary}/worker")
            worker.send_multipart(codec.encode(ToEngine(answer)))
            await ended.wait()
    finally:
        socket.close()
    if isinstance(taken[0], ProtocolError):
        return taken[0]
    assert taken == [answer]
    return None
