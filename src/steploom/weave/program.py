"""Programs: one request's unmodified pipeline call, suspended whenever it needs a shared module.

SQLAlchemy bridges sync code to asyncio with the same technique; see ``sqlalchemy/util/concurrency.py``.
"""

from __future__ import annotations

import contextvars
import logging
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal

import greenlet
import torch

from steploom.weave.calls import ModuleCall
from steploom.weave.exits import Ended
from steploom.weave.holdings import Holdings
from steploom.weave.modules.kept import Kept, restore
from steploom.weave.noise.observed import StepDue, StepEnd
from steploom.weave.order import is_denoiser

if TYPE_CHECKING:
    from steploom.weave.forms import Facts
    from steploom.weave.forwards.step_cache import StepCache
    from steploom.weave.watching import Watcher

log = logging.getLogger(__name__)

Phase = Literal["encode", "denoise", "decode", "done"]

_UNWIND_TRIES = 8
_AUTOCAST_DEVICES = ("cuda", "cpu")


class Program:
    """The suspended pipeline call of one request.

    Drive it from the hub only: :meth:`resume` runs the pipeline's own code until it needs a module (``call`` is set),
    has ended a step (``steps`` grows), or is over (``done``, with ``output`` or ``error``).

    Args:
        name: For messages.
        body: The pipeline call.
        watcher: What its pipeline reports.
        doubled: Ways of asking for the same with twice the samples, for probing axes.
        context: Context variables of whoever asked, for callbacks; None takes those of the caller.
        samples: That it makes, as far as its request says.

    Attributes:
        due: The step that it waits for.
        step_end: The step that ended in this tick, if one did.
        answer: What the hub found for ``call``.
        fault: What the hub's attempt at ``call`` raised.
        batch_key: What its last denoiser call shared with those that it could be merged with.
        called: Whether it has made any module call.
        failed: The component whose call failed last.
        shared_with: For each denoiser call of this tick, how many requests took part.
        rows: Rows that it brought to its last denoiser call.
        holdings: What it keeps between steps.
        forms: Ids of the forms of its module calls.
        calls_made: Calls of this tick, by module.
        last_module: The module called last in this tick.
        witness: Is called when a step has ended, while the program still stands in it.
        step_cache: Answers denoiser calls of steps that may be skipped; None if none may.
        skipped_steps: Steps that it has answered.
        aside: Whether it waits for what runs beside the ticks, or for its turn to go on after that.
        answered: Whether it may go on, being aside.
        decoded: What modules have given it after its last step, and nobody has looked at; None if nobody will.
        asked: At which step it first called a module within its loop that is no denoiser, by module.
    """

    def __init__(
        self,
        name: str,
        body: Callable[[], Any],
        watcher: Watcher,
        doubled: Callable[[], Iterable[Program]] = tuple,
        context: contextvars.Context | None = None,
        samples: int = 1,
    ) -> None:
        self.name = name
        self.samples = samples
        self.watcher = watcher
        self.doubled = doubled
        self.answer: Any = None
        self.fault: Exception | None = None
        self.batch_key: str | None = None
        self.called = False
        self.failed: str | None = None
        self.shared_with: list[int] = []
        self.rows = 0
        self.holdings = Holdings()
        self.forms: set[int] = set()
        self.calls_made: dict[str, int] = {}
        self.last_module: str | None = None
        self.call: ModuleCall | None = None
        self.due: StepDue | None = None
        self.step_end: StepEnd | None = None
        self.witness: Callable[[], None] | None = None
        self.step_cache: StepCache | None = None
        self.skipped_steps = 0
        self.aside = self.answered = False
        self.decoded: list[Any] | None = None
        self.asked: dict[str, int] = {}
        self.done = False
        self.output: Any = None
        self.error: BaseException | None = None
        self.steps = 0
        self.phase: Phase = "encode"
        self.seconds: dict[str, float] = {"encode": 0.0, "denoise": 0.0, "decode": 0.0}
        self._since = time.perf_counter()
        self._unshared: list[tuple[str, str]] = []
        self._greenlet = greenlet.greenlet(body)
        self._greenlet.gr_context = contextvars.copy_context() if context is None else context.copy()
        self._greenlet.unshared = self._unshared  # pyright: ignore[reportAttributeAccessIssue] - for note_unshared
        self._kept: list[Kept] = []
        self._greenlet.kept = self._kept  # pyright: ignore[reportAttributeAccessIssue] - for keep

    def resume(self, value: Any = None, error: BaseException | None = None) -> None:
        """Runs the program until it stops again; ``value`` or ``error`` answers the call that it waits for."""
        if error is not None and self.call is not None:
            self.failed = self.call.target.name
        if self.decoded is not None and self.phase == "decode":
            self.decoded.append(value)
        self.call = None
        self.aside = self.answered = False
        first = not self._greenlet.gr_frame and not self._greenlet.dead
        try:
            if error is not None:
                stop = self._greenlet.throw(error)
            else:
                stop = self._greenlet.switch() if first else self._greenlet.switch(value)
        except Ended:
            raise
        except BaseException as fault:  # noqa: BLE001 - the request's own failure (a callback may raise SystemExit)
            restore(self._kept)
            self._finish(error=fault)
            return
        changed = restore(self._kept) if self._kept else None
        if changed is not None:
            self._refuse(changed)
        elif self._greenlet.dead:
            raised = isinstance(stop, greenlet.GreenletExit)  # which a greenlet gives as if it were its result
            self._finish(**({"error": stop} if raised else {"output": stop}))
        elif isinstance(stop, ModuleCall):
            self.call, self.called = stop, True
        elif isinstance(stop, StepDue):
            self.due = stop
        else:
            self._stepped(stop)

    def _refuse(self, fault: Exception) -> None:
        """It has done what it may not: it fails, where it stands."""
        if self._greenlet.dead:
            self._finish(error=fault)
        else:
            self.resume(error=fault)

    def take_step(self, answer: Any = None) -> None:
        """The step that is due has been taken with others', and gave ``answer``; without one it is taken now, alone."""
        due, self.due = self.due, None
        assert due is not None
        if answer is None:
            try:
                end = due.take_alone()
            except Exception as fault:  # noqa: BLE001 - thrown into the program, whose step it is
                self.resume(error=fault)
                return
        else:
            end = due.taken(answer)
        self.answer = due.answer
        self._stepped(end)

    def _stepped(self, end: StepEnd) -> None:
        self.step_end = end
        self.steps += 1
        self.enter("decode" if self.steps == self.watcher.total_steps else "denoise")
        if self.step_cache is not None:
            self.step_cache.step_ended(self)

    def shared(self, name: str, requests: int) -> None:
        """Its call of the component ``name`` was run together with those of others, ``requests`` in all."""
        if is_denoiser(name):
            self.shared_with.append(requests)

    def note(self, facts: Facts) -> int:
        """Takes over what is known of its call; returns the number of the merge key."""
        if facts.batch_key is not None:
            self.batch_key, self.rows = facts.batch_key, facts.rows
        return facts.key

    @property
    def begun(self) -> bool:
        """Whether any of its code has run."""
        return bool(self._greenlet.gr_frame or self._greenlet.dead)

    def settle_with(self, settle: Callable[[], None]) -> None:
        """Before it runs a module at once, ``settle`` waits until nothing else runs one."""
        self._greenlet.settle = settle  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def frame(self) -> Any:
        """The innermost frame of its suspended call; None where it does not stand in one."""
        return self._greenlet.gr_frame

    def take_unshared(self) -> list[tuple[str, str]]:
        """Module calls that it made at once, alone, since the last call of this: module and reason."""
        if not self._unshared:
            return []
        made = self._unshared.copy()
        self._unshared.clear()
        return made

    def enter(self, phase: Phase) -> None:
        """Notes that the program is in ``phase`` from now on."""
        now = time.perf_counter()
        if self.phase in self.seconds:
            self.seconds[self.phase] += now - self._since
        self._since = now
        self.phase = phase

    def take_seconds(self) -> dict[str, float]:
        """Wall seconds per phase since the last call of this."""
        self.enter(self.phase)
        seconds, self.seconds = self.seconds, dict.fromkeys(self.seconds, 0.0)
        return seconds

    def unwind(self) -> None:
        """Ends the program where it stands: its ``finally`` blocks run, its frames are freed.

        A cycle through a suspended frame is never collected, so this is not left to the garbage collector.
        """
        for _ in range(_UNWIND_TRIES):
            if self._greenlet.dead or not self._greenlet.gr_frame:
                break
            try:
                self._greenlet.throw(greenlet.GreenletExit)
            except Ended:
                raise
            except BaseException as fault:  # noqa: BLE001 - a cancelled program's last words (a callback may exit)
                log.info("request %s raised %s as it was ended: %s", self.name, type(fault).__name__, fault)
            restore(self._kept)
        self.call = self.step_end = self.witness = self.due = self.step_cache = None
        self.done = True
        self.watcher.close()

    def _finish(self, output: Any = None, error: BaseException | None = None) -> None:
        self.enter("done")
        self.step_cache = None
        self.done, self.output, self.error = True, output, error
        self.watcher.close()


def suspend(stop: ModuleCall | StepDue | StepEnd) -> Any:
    """Hands ``stop`` to the hub and waits for its answer. Called on a program's greenlet."""
    hub = greenlet.getcurrent().parent
    assert hub is not None
    if not autocasts():
        return hub.switch(stop)
    # Autocast is a property of the thread, not of the greenlet: it must not leak into other programs.
    casts = [(device, torch.get_autocast_dtype(device)) for device in _AUTOCAST_DEVICES
             if torch.is_autocast_enabled(device)]  # fmt: skip
    for device, _ in casts:
        torch.set_autocast_enabled(device, False)
    try:
        return hub.switch(stop)
    finally:
        for device, dtype in casts:
            torch.set_autocast_enabled(device, True)
            torch.set_autocast_dtype(device, dtype)


def autocasts() -> bool:
    """Whether the code that runs now does so under autocast."""
    return torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu")


def may_suspend() -> bool:
    """Whether the code that runs now is a program in the hub's own modes."""
    return greenlet.getcurrent().parent is not None and not (
        torch.is_grad_enabled() or torch.is_inference_mode_enabled()
    )


def why_alone() -> str | None:
    """Why a module call made now has to run at once, unshared; None if it may run elsewhere."""
    if torch.is_grad_enabled():
        return "gradients were enabled"
    if torch.is_inference_mode_enabled():
        return "the pipeline runs in inference mode"
    if autocasts():
        return "the pipeline runs under autocast"
    return None if greenlet.getcurrent().parent is not None else "called outside of a program"


def note_unshared(module: str, reason: str) -> None:
    """The program that runs now executes a call of ``module`` at once: when nothing runs beside the ticks."""
    current = greenlet.getcurrent()
    made: list[tuple[str, str]] | None = getattr(current, "unshared", None)
    if made is not None:
        made.append((module, reason))
    kept: list[Kept] | None = getattr(current, "kept", None)
    changed = restore(kept) if kept else None
    if changed is not None:
        raise changed
    settle: Callable[[], None] | None = getattr(current, "settle", None)
    if settle is not None:
        settle()
