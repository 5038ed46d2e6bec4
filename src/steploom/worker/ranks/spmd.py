"""The ranks of a worker: processes that run the same programs in the same order.

Rank 0 serves the engine, like any worker. What it is told to do it tells the others before it does it itself: each tick
as it begins, each call, and the end. So nobody else decides what is in a tick. After each, all compare what came of it.
Where they differ, or where one of them has ended, the worker ends at once, as a whole: its requests are replayed. No
rank waits for one that is lost.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any, NoReturn, Protocol, TypeVar

import msgspec

from steploom import codec
from steploom.config import LONGEST_S
from steploom.errors import EngineError, raised
from steploom.protocol import ErrorInfo
from steploom.worker.messages import Call, Close, Configure, Tick

T = TypeVar("T")


class Begin(msgspec.Struct, frozen=True, tag=True):
    """The first word of rank 0: what to load, and which rank this is."""

    config: Configure
    index: int
    size: int
    store: str


class Met(msgspec.Struct, frozen=True, tag=True):
    """A rank has loaded the model, and waits for the others."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """A rank cannot load the model."""

    error: ErrorInfo


class Faulted(msgspec.Struct, frozen=True, tag=True):
    """A forward has raised this."""

    fault: str


class Did(msgspec.Struct, frozen=True, tag=True):
    """What a tick or a call came to: what all ranks have to agree in, and the memory of this one."""

    outcome: list[Any]
    room_bytes: int = 0
    peak_bytes: int = 0


class Go(msgspec.Struct, frozen=True, tag=True):
    """Go on: all ranks are here."""


class Settled(msgspec.Struct, frozen=True, tag=True):
    """What rank 0 has found out, which holds for all."""

    value: Any = None


Word = Begin | Tick | Call | Close | Met | Failed | Faulted | Did | Go | Settled
"""What ranks say to each other."""


class Said(msgspec.Struct, frozen=True):
    """A word on the wire."""

    word: Word


class Link:
    """A rank's connection with another one: whole messages, in order.

    Args:
        descriptor: Of a connected local socket.
    """

    def __init__(self, descriptor: int) -> None:
        self.packages: tuple[str, ...] = codec.PACKAGES
        self._connection = Connection(descriptor)

    def say(self, word: Word) -> None:
        """Sends it.

        Raises:
            InvalidRequest: Something in it cannot travel; nothing was sent.
            OSError: The other one is gone.
        """
        self.pass_on(codec.encode(Said(word), packages=self.packages))

    def pass_on(self, frames: list[codec.Buffer]) -> None:
        """Sends a message that was encoded for several."""
        self._connection.send_bytes(len(frames).to_bytes(4, "little"))
        for frame in frames:
            self._connection.send_bytes(memoryview(frame).cast("B"))

    def hear(self, seconds: float | None = None) -> Word:
        """The next message.

        Raises:
            EOFError: The other one is gone.
            TimeoutError: None has come within so many seconds.
        """
        if not self._connection.poll(seconds):
            raise TimeoutError
        count = int.from_bytes(self._connection.recv_bytes(), "little")
        frames: list[codec.Buffer] = [self._connection.recv_bytes() for _ in range(count)]
        return codec.decode(frames, Said, packages=self.packages).word


class Rank(Protocol):
    """This process as one of several.

    Attributes:
        index: Its number; 0 serves the engine.
        size: How many there are.
        store: A file where torch's own processes find each other.
    """

    index: int
    size: int
    store: str

    def meet(self) -> None:
        """Returns when all have loaded the model.

        Raises:
            SteploomError: One of them cannot; in rank 0.
        """
        ...

    def settle(self, value: T) -> T:
        """What rank 0 has found, of whatever each rank finds out for itself: the same for all."""
        ...

    def fault(self, error: Exception) -> None:
        """A forward has raised ``error`` here. Returns if it has done so in all ranks; else the worker ends."""
        ...


class First:
    """Rank 0: see :class:`Rank`.

    Args:
        links: With the others.
        store: See there.
        agree_s: Seconds within which all ranks have to fail at a forward at which one has failed.
        news_s: Seconds for whoever watches a rank that has hung up to say how it ended.
    """

    def __init__(self, links: list[Link], store: str, agree_s: float, news_s: float) -> None:
        self._agree_s, self._news_s = min(agree_s, LONGEST_S), min(news_s, LONGEST_S)
        self.index, self.size, self.store = 0, len(links) + 1, store
        self._links = links
        self._met = False

    def tell(self, word: Word) -> None:
        """Tells all others; encoded once.

        Raises:
            InvalidRequest: Something in it cannot travel; nobody was told.
        """
        frames = codec.encode(Said(word), packages=self._links[0].packages)
        for link in self._links:
            with contextlib.suppress(OSError):  # it has ended, of which whoever watches it learns by itself
                link.pass_on(frames)

    def trust(self, packages: tuple[str, ...]) -> None:
        """Dataclasses of these may travel from now on."""
        for link in self._links:
            link.packages = packages

    def meet(self) -> None:
        """See :meth:`Rank.meet`."""
        for index, link in enumerate(self._links, 1) if not self._met else ():
            word = self._hear(index, link)
            if isinstance(word, Failed):
                raise word.error.exception()
        if not self._met:
            self.tell(Go())
        self._met = True

    def settle(self, value: T) -> T:
        """See :meth:`Rank.settle`."""
        self.tell(Settled(value))
        return value

    def fault(self, error: Exception) -> None:
        """See :meth:`Rank.fault`."""
        mine = raised(error)
        for index, link in enumerate(self._links, 1):
            word = self._hear(index, link, self._agree_s)
            if word != Faulted(mine):
                lose(f"rank 0 raised {mine}, and rank {index} did not: {str(word)[:300]}")
        self.tell(Go())

    def compare(self, did: Did) -> list[Did]:
        """What the others' tick or call came to, which is what this one's did: else the worker ends."""
        others: list[Did] = []
        for index, link in enumerate(self._links, 1):
            word = self._hear(index, link)
            if not isinstance(word, Did) or word.outcome != did.outcome:
                lose(f"rank {index} does not agree: {str(word)[:500]}, but in rank 0: {str(did)[:500]}")
            others.append(word)
        return others

    def _hear(self, index: int, link: Link, seconds: float | None = None) -> Word:
        try:
            return link.hear(seconds)
        except TimeoutError:
            lose(f"rank {index} has not failed at what rank 0 has failed at")
        except (EOFError, OSError):
            threading.Event().wait(self._news_s)
            lose(f"rank {index} is gone")


class Other:
    """A rank that rank 0 has started: see :class:`Rank`.

    Args:
        index: Its number.
        size: How many there are.
        store: See there.
        link: With rank 0.
        agree_s: As that of rank 0.

    Attributes:
        met: Whether all have loaded.
    """

    def __init__(self, index: int, size: int, store: str, link: Link, agree_s: float) -> None:
        self._agree_s = min(agree_s, LONGEST_S)
        self.index, self.size, self.store = index, size, store
        self.met = False
        self._link = link

    def meet(self) -> None:
        """See :meth:`Rank.meet`."""
        if not self.met:
            self._link.say(Met())
            self._link.hear()
        self.met = True

    def settle(self, value: T) -> T:
        """See :meth:`Rank.settle`."""
        word = self._link.hear()
        if not isinstance(word, Settled):
            lose(f"rank {self.index} waits for what rank 0 has found out, but heard {str(word)[:300]}")
        return word.value

    def fault(self, error: Exception) -> None:
        """See :meth:`Rank.fault`."""
        mine = raised(error)
        self._link.say(Faulted(mine))
        try:
            word = self._link.hear(self._agree_s)
        except TimeoutError:
            lose(f"rank {self.index} raised {mine}, and rank 0 did not")
        if not isinstance(word, Go):
            lose(f"rank {self.index} raised {mine}, and heard {str(word)[:300]}")


def lose(why: str) -> NoReturn:
    """Ends this worker at once, all of its ranks, and says why: they are not where each other believes them to be."""
    print(f"the worker ends, since its ranks are not together any more: {why}", flush=True)  # noqa: T201
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    sys.stdout.flush()
    os._exit(1)  # rank 0 sees that, and ends all


_here: list[Rank] = []


def join(rank: Rank) -> None:
    """From now on this process is that rank; once, like torch.distributed's own."""
    _here.append(rank)


def here() -> Rank | None:
    """Which rank this process is; None if its worker has one."""
    return _here[-1] if _here else None


def required(setting: str) -> Rank:
    """The rank that this process is.

    Raises:
        EngineError: It is none.
    """
    found = here()
    if found is None:
        raise EngineError(
            f"{setting}: the ranks of a worker are processes that an engine's own worker starts; use 'mp'"
        )
    return found
