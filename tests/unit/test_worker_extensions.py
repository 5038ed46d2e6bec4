"""What a worker's extension raises, and what a worker says that it offers."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from steploom.errors import GenerationFailed, InvalidRequest
from steploom.weave.exits import Ended
from steploom.worker.rpc import Extensions


class Extension:
    """Of yours."""

    number = 5

    def raises(self, kind: type[BaseException], *args: Any) -> None:
        raise kind(*args)

    @classmethod
    def of_class(cls) -> str:
        return "class"

    @staticmethod
    def of_nobody() -> str:
        return "static"

    @property
    def asked(self) -> int:
        raise AssertionError("nobody asked for it")


class RunnerOfNothing:
    forgot = 0

    def forget_weights(self) -> None:
        self.forgot += 1


@pytest.fixture
def offered() -> Iterator[Extensions]:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a worker process
    yield Extensions(RunnerOfNothing(), f"{__name__}.Extension")  # pyright: ignore[reportArgumentType]
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("kind", "args", "said"),
    [
        (SystemExit, (3,), "SystemExit: 3"), (KeyboardInterrupt, (), "KeyboardInterrupt"),
        (asyncio.CancelledError, ("x",), "CancelledError: x"), (GeneratorExit, (), "GeneratorExit"),
    ],
)  # fmt: skip
def test_what_would_end_the_process_is_a_failure_of_the_call(
    offered: Extensions, kind: type[BaseException], args: tuple[Any, ...], said: str
) -> None:
    with pytest.raises(GenerationFailed, match=f"^{said}$"):
        offered.call("raises", (kind, *args), {})
    assert offered._runner.forgot == 1


@pytest.mark.parametrize(("kind", "args"), [(ValueError, ("bad",)), (Ended, (signal.SIGTERM,))])
def test_exceptions_and_signals_are_as_they_were(offered: Extensions, kind: Any, args: tuple[Any, ...]) -> None:
    with pytest.raises(kind):
        offered.call("raises", (kind, *args), {})


def test_what_is_offered_can_be_called(offered: Extensions) -> None:
    with pytest.raises(InvalidRequest) as refused:
        offered.call("number", (), {})
    said = "method='number': this worker offers of_class, of_nobody, ping, raises, sleep, stats, wake_up"
    assert str(refused.value) == said
    assert (offered.call("of_class", (), {}), offered.call("of_nobody", (), {})) == ("class", "static")
