"""Aside: text encoders and VAEs run beside the ticks, so that the steps of others do not wait for them.

On CUDA, and on a CPU with a core to spare, on a thread of their own (:class:`SideThread`); on a CPU without, in slices
of the ticks (:mod:`~steploom.weave.aside.slices`). Everything else of a program stays on the hub's thread: only the
forward of the module moves. One group of calls runs at a time, so no module is used twice at once; whoever would use or
change one on the hub's thread meanwhile first calls :meth:`Aside.settle`.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Hashable
from typing import Any, NamedTuple

import greenlet
import torch

from steploom.weave.aside.streams import SideStream
from steploom.weave.batching.batches import Group
from steploom.weave.calls import ModuleCall
from steploom.weave.program import Program

LINGER_S = 1.0
"""How long the thread waits for more to do before it ends."""


class Errand(NamedTuple):
    """A call that waits for its turn; ``mark``: what it comes after on a CUDA device."""

    program: Program
    call: ModuleCall
    mark: Any = None


class Aside:
    """Calls that are under way beside the ticks: this one takes none. All methods are for the hub's thread.

    Calls wait in order of arrival; those of one module that wait together run together.

    Args:
        answer: Runs a group of calls; nobody else uses what it uses while anything is under way.
    """

    takes_any = False

    def __init__(self, answer: Callable[[Group], None]) -> None:
        self._answer = answer
        self._queue: deque[Errand] = deque()
        self._running: list[Errand] = []
        self._done: deque[Errand] = deque()
        self._began = 0.0
        self._took: dict[Hashable, float] = {}
        self._fault: BaseException | None = None

    @property
    def working(self) -> bool:
        """Whether anything is under way."""
        return bool(self._queue or self._running)

    @property
    def busy(self) -> bool:
        """Whether anything is under way, or done and not taken."""
        return bool(self._queue or self._running or self._done)

    def takes(self, call: ModuleCall) -> bool:
        """Whether a call may run here: not if hooks move its module about, nor if it was compiled.

        Offloading evicts one module when another runs; compiled code belongs to the thread that runs it.
        """
        module: Any = call.target.module
        return self.takes_any and not hasattr(module, "_orig_mod") and not any(map(_bound, module.modules()))

    def send(self, group: Group) -> None:
        """The calls are under way from now on: their programs are aside until they are resumed."""
        mark = self._mark()
        for program, call in group:
            program.aside, program.answered = True, False
            self._queue.append(Errand(program, call, mark))
        self._start()

    def take(self) -> None:
        """Marks the programs that were answered.

        Raises:
            BaseException: What a run raised beyond what concerns single programs.
        """
        while self._done:
            errand = self._done.popleft()
            errand.program.answered = True
            self._returned(errand)
        fault, self._fault = self._fault, None
        if fault is not None:
            raise fault

    def spend(self, seconds: float) -> bool:
        """Gives what is under way so much of this thread's time; whether anything is done."""
        return bool(self._done)

    def settle(self) -> None:
        """Returns when nothing is under way."""
        while self.working:
            self.spend(math.inf)

    def drop(self, program: Program) -> None:
        """The program was cancelled: what it waits for is not begun. What has begun goes on (:meth:`runs`)."""
        self._queue = deque(errand for errand in self._queue if errand.program is not program)
        self._done = deque(errand for errand in self._done if errand.program is not program)

    def runs(self, program: Program) -> bool:
        """Whether a call of the program runs now, so that it must not be unwound."""
        return any(errand.program is program for errand in self._running)

    @property
    def adapted(self) -> bool:
        """Whether a call that is under way has a request's adapters."""
        return any(errand.call.target.adapted is not None for errand in (*self._queue, *self._running))

    def close(self) -> None:
        """Drops what has not begun, and waits for what has."""
        self._queue.clear()
        self.settle()

    def _start(self) -> None:
        """There is something in the queue."""

    def _mark(self) -> Any:
        return None

    def _returned(self, errand: Errand) -> None:
        """The answer is about to be used on the hub's thread."""

    def _pick(self) -> list[Errand]:
        """The next errands to run: the first that waits, and all others of its module."""
        name = self._queue[0].call.target.name
        self._running = [errand for errand in self._queue if errand.call.target.name == name]
        self._queue = deque(errand for errand in self._queue if errand.call.target.name != name)
        self._began = time.perf_counter()
        return self._running

    def _perform(self, running: list[Errand]) -> None:
        """Runs errands to their end."""
        try:
            with self.timed(running[0].call):
                self._answer([(errand.program, errand.call) for errand in running])
        except BaseException as fault:  # noqa: BLE001 - another stack's boundary: raised on the hub's
            self._fault = fault

    def _ended(self) -> None:
        """What runs is done."""
        self._done.extend(self._running)
        self._running = []

    @contextlib.contextmanager
    def timed(self, call: ModuleCall) -> Generator[None]:
        """Calls like this one run within, and take about so long the next time."""
        started = time.perf_counter()
        yield
        self._took[call.target.name, call.target.method] = time.perf_counter() - started

    def _remaining_s(self) -> float:
        """Seconds until what runs, or is next, is likely to be done; as long again where nobody knows or it is late."""
        (first, *_), spent = (self._running, time.perf_counter() - self._began) if self._running else (self._queue, 0.0)
        expected = self._took.get((first.call.target.name, first.call.target.method), 0.0)
        return expected - spent if expected > spent else spent


class SideThread(Aside):
    """One thread runs what is under way.

    Args:
        answer: As :class:`Aside`'s; called on the thread.
        stream: On which it runs on a CUDA device.
        threads: Of torch, on a CPU, for the thread; None leaves as many as others have.
    """

    takes_any = True

    def __init__(
        self, answer: Callable[[Group], None], stream: SideStream | None = None, threads: int | None = None
    ) -> None:
        super().__init__(answer)
        self._stream, self._threads = stream, threads
        self._news = threading.Condition()  # guards what both threads use; notified of all that happens
        self._thread: threading.Thread | None = None

    def send(self, group: Group) -> None:
        """The calls are under way from now on."""
        with self._news:
            super().send(group)

    def take(self) -> None:
        """Marks the programs that were answered."""
        with self._news:
            super().take()

    def drop(self, program: Program) -> None:
        """What the program waits for is not begun."""
        with self._news:
            super().drop(program)

    def spend(self, seconds: float) -> bool:
        """Waits for what runs, if it is likely to be done in so many seconds; whether anything is done."""
        with self._news:
            if not self._done and self.working and (seconds == math.inf or self._remaining_s() <= seconds):
                self._news.wait_for(lambda: bool(self._done), None if seconds == math.inf else seconds)
            return bool(self._done)

    def settle(self) -> None:
        """Returns when nothing is under way."""
        with self._news:
            self._news.wait_for(lambda: not self.working)

    def close(self) -> None:
        """Drops what has not begun, waits for what has, and ends the thread."""
        with self._news:
            self._queue.clear()
            self._news.wait_for(lambda: not self.working)
            thread, self._thread = self._thread, None
            self._news.notify_all()
        if thread is not None:
            thread.join()

    def _start(self) -> None:
        self._news.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="steploom-aside", daemon=True)
            self._thread.start()
            if self._threads is not None:  # the thread's number must not become that of threads to come
                self._news.wait_for(lambda: not self._queue)
                torch.set_num_threads(torch.get_num_threads())

    def _work(self) -> None:
        greenlet.getcurrent().aside = True  # pyright: ignore[reportAttributeAccessIssue]
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        with torch.no_grad():  # not inference_mode: pipelines update in place what they get
            while running := self._next():
                try:
                    self._performed(running)
                except BaseException as fault:  # noqa: BLE001 - of the device: raised on the hub's thread, which waits
                    self._fault = fault
                with self._news:
                    self._ended()
                    self._news.notify_all()
                del running

    def _performed(self, running: list[Errand]) -> None:
        if self._stream is None:
            self._perform(running)
            return
        with self._stream.entered([errand.mark for errand in running], _given(running)):
            self._perform(running)

    def _next(self) -> list[Errand]:
        """The next errands; none if it is time to end."""
        me = threading.current_thread()
        with self._news:
            self._news.wait_for(lambda: self._queue or self._thread is not me, LINGER_S)
            if self._queue and self._thread is me:
                running = self._pick()
                self._news.notify_all()
                return running
            if self._thread is me:
                self._thread = None
            return []

    def _mark(self) -> Any:
        return None if self._stream is None else self._stream.mark()

    def _returned(self, errand: Errand) -> None:
        if self._stream is not None:
            self._stream.taken_back(_tensors([errand.program.answer]))


def is_aside() -> bool:
    """Whether the code that runs now runs beside the ticks."""
    return getattr(greenlet.getcurrent(), "aside", False)


def _bound(part: Any) -> bool:
    state = part.__dict__
    return "_hf_hook" in state or "_diffusers_hook" in state or state.get("_compiled_call_impl") is not None


def _given(running: list[Errand]) -> list[torch.Tensor]:
    return _tensors([leaf for errand in running for leaf in errand.call.leaves])


def _tensors(value: Any, depth: int = 4) -> list[torch.Tensor]:
    """The tensors in arguments or an answer, and in the attributes of objects there: a VAE's distribution has some."""
    if isinstance(value, torch.Tensor):
        return [value]
    if not depth or isinstance(value, (torch.nn.Module, type)):
        return []
    inner: Any = value if isinstance(value, (list, tuple)) else getattr(value, "__dict__", {}).values()
    inner = value.values() if isinstance(value, dict) else inner
    return [tensor for one in inner for tensor in _tensors(one, depth - 1)]
