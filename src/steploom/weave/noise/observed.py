"""Noise schedulers: each request has a copy, observed so that every ``step`` ends a step of its program.

The copy's ``__class__`` is swapped for a subclass: a wrapper object would break pipelines that ``deepcopy`` their
scheduler inside ``__call__`` (LTX2, Cosmos3, Kandinsky 6). Only the observed object itself ends steps. Its copies tell
theirs as parts of a step: SkyReels' diffusion forcing has a copy for each latent frame, and steps nothing else.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from steploom.weave.modules.rebinding import functions_of, unsettled
from steploom.weave.noise.estimate import estimate
from steploom.weave.noise.solvers import RowStep, row_step
from steploom.weave.noise.solvers.rows import as_they_are, columns


class StepEnd:
    """One end of an observed ``step``.

    Attributes:
        latents: After the step ``[rows, ...]``.
        timestep: As the pipeline gave it.
        sigma: Noise level after the step; None where the noise scheduler has none.
        result: What ``step`` returned.
        given: The arguments of ``step``, by name.
    """

    __slots__ = ("_estimate", "given", "latents", "result", "sigma", "timestep")

    def __init__(self, result: Any, given: Mapping[str, Any], sigma: float | None, estimate: Callable[[], Any]) -> None:
        self.latents = result[0] if isinstance(result, tuple) else getattr(result, "prev_sample", None)
        self.timestep = given.get("timestep")
        self.sigma = sigma
        self.result = result
        self.given = given
        self._estimate = estimate

    def estimate(self) -> Any:
        """The estimate of the finished latents (x0) that the step started from ``[rows, ...]``."""
        return self._estimate()

    def result_with(self, latents: Any) -> Any:
        """What ``step`` would have returned if it had ended at ``latents``."""
        if isinstance(self.result, tuple):
            return (latents, *self.result[1:])
        return dataclasses.replace(self.result, prev_sample=latents)


class StepDue:
    """A step that its program waits for, so that it can be taken together with other requests' steps.

    Attributes:
        rows: The step.
        answer: What ``step`` returned, once it has been taken.
    """

    __slots__ = ("_alone", "_told", "answer", "rows")

    def __init__(self, rows: RowStep, alone: Callable[[], Any], told: Callable[[Any], StepEnd]) -> None:
        self.rows = rows
        self.answer: Any = None
        self._alone = alone
        self._told = told

    def taken(self, answer: Any) -> StepEnd:
        """It has been taken; its noise scheduler stands behind it."""
        self.answer = answer
        return self._told(answer)

    def take_alone(self) -> StepEnd:
        """Takes it by itself, with diffusers' own ``step``."""
        return self.taken(self._alone())


class Observer(Protocol):
    """Who hears of a noise scheduler's steps."""

    def ended(self, noise_scheduler: Any, end: StepEnd) -> None:
        """A step of ``noise_scheduler`` was taken."""
        ...

    def part_ended(self, end: StepEnd, result: Any) -> None:
        """A copy that the pipeline has made of its noise scheduler has taken a step, which returned ``result``."""
        ...

    def may_pause(self) -> bool:
        """Whether the program may stop here."""
        ...

    def pause(self, stop: StepEnd | StepDue) -> Any:
        """Stops the program until the hub goes on with it; returns the hub's answer."""
        ...


class _Observation:
    """Who hears of a copy's steps, and from which of its own step indices the last one began.

    Attributes:
        by_rows: Whether a step may be taken with others', which calls none of the methods that ``step`` does.
    """

    def __init__(self, observer: Observer, *, by_rows: bool) -> None:
        self.observer = observer
        self.by_rows = by_rows
        self.began: int | None = None

    def begins(self, index: int | None) -> bool:
        """Whether a step that begins at ``index`` is a new one.

        Cosmos takes each step twice, and MultiDiffusion once per view: then the first is the one that is told.
        """
        new, self.began = index is None or index != self.began, index
        return new


_observers: dict[int, _Observation] = {}
_copies: weakref.WeakKeyDictionary[Any, _Observation] = weakref.WeakKeyDictionary()


def observe(noise_scheduler: Any, observer: Observer) -> Any:
    """A copy of ``noise_scheduler`` whose every ``step`` is told to ``observer``, until :func:`forget`."""
    config = getattr(noise_scheduler, "_internal_dict", None)  # frozen, and most of what there is to copy
    own = unsettled(noise_scheduler, config)
    if hasattr(own, "step"):
        object.__setattr__(own, "__class__", _observed_class(type(own)))  # one that wraps another passes on what is set
        _observers[id(own)] = _Observation(observer, by_rows=functions_of(own).keys() <= {"step"})
    return own


def forget(noise_scheduler: Any) -> None:
    """Ends the observation of a copy."""
    _observers.pop(id(noise_scheduler), None)


def total_steps(noise_scheduler: Any, announced: int | None) -> int | None:
    """How many ``step`` calls the noise scheduler expects, if it knows.

    Args:
        noise_scheduler: After ``set_timesteps``.
        announced: Steps as the user counts them, where the pipeline has said so: fewer than the noise scheduler's under
            ``strength``. PNDM and samplers of second order call ``step`` more often than that.
    """
    timesteps = getattr(noise_scheduler, "timesteps", None)
    if timesteps is None:
        return announced
    steps = getattr(noise_scheduler, "num_inference_steps", None)
    order = getattr(noise_scheduler, "order", 1)
    if (
        announced is None
        or not isinstance(steps, int)
        or (order == 1 and not hasattr(noise_scheduler, "plms_timesteps"))
    ):
        return len(timesteps) if announced is None else announced
    return len(timesteps) - (steps - announced) * order


def turns(steps: int, noise_schedulers: Sequence[Any]) -> int:
    """How often a loop of ``steps`` steps may turn: samplers of second order take two for one, and PNDM some besides.

    Args:
        steps: As the user counts them.
        noise_schedulers: Those of the loop, after ``set_timesteps``.
    """
    orders = [order for one in noise_schedulers if isinstance(order := getattr(one, "order", 1), int)]
    besides = [len(one.timesteps) - one.num_inference_steps for one in noise_schedulers
               if hasattr(one, "plms_timesteps") and one.num_inference_steps is not None]  # fmt: skip
    return steps * max(orders, default=1) + max(besides, default=0)


@functools.cache
def _observed_class(cls: type) -> type:
    """A subclass of ``cls`` with the same name, whose ``step`` reports."""
    original: Any = cls.step  # pyright: ignore[reportAttributeAccessIssue]
    signature = inspect.signature(original)
    names = [name for name in signature.parameters if name != "self"]

    @functools.wraps(original)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen = _observers.get(id(self))
        before = getattr(self, "step_index", None)
        arguments = dict(zip(names, args, strict=False)) | kwargs  # their order is not the same everywhere
        if seen is None and self in _copies:
            result = original(self, *args, **kwargs)
            _copies[self].observer.part_ended(_part(self, arguments), result)
            return result
        if seen is None or not seen.begins(before):
            return original(self, *args, **kwargs)
        observer = seen.observer

        def told(result: Any) -> StepEnd:
            end = _end(self, result, before, arguments)
            observer.ended(self, end)
            return end

        rows = row_step(cls, self, arguments) if seen.by_rows and observer.may_pause() else None
        if rows is not None:
            return observer.pause(StepDue(rows, lambda: original(self, *args, **kwargs), told))
        result = original(self, *args, **kwargs)
        end = told(result)
        if observer.may_pause():
            observer.pause(end)
        return result

    step.__signature__ = signature  # pyright: ignore[reportAttributeAccessIssue] - pipelines ask for it in every call
    members: dict[str, Any] = {"step": step, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    if not hasattr(cls, "__deepcopy__"):
        members["__deepcopy__"] = _copied
    return _ObservedMeta(cls.__name__, (cls,), members)


def _copied(noise_scheduler: Any, memo: dict[int, Any]) -> Any:
    """What ``copy.deepcopy`` makes of an observed noise scheduler, whose steps are parts of those of its program."""
    own = memo[id(noise_scheduler)] = object.__new__(type(noise_scheduler))
    own.__dict__.update(copy.deepcopy(noise_scheduler.__dict__, memo))
    seen = _observers.get(id(noise_scheduler)) or _copies.get(noise_scheduler)
    if seen is not None:
        _copies[own] = seen
    return own


def _part(noise_scheduler: Any, arguments: Mapping[str, Any]) -> StepEnd:
    """The step of a copy: of the latents of which its sample is a part. Nobody knows what they will be in the end."""
    sample = arguments.get("sample")
    whole = getattr(sample, "_base", None)
    if whole is None or whole.ndim != getattr(sample, "ndim", 0) + 1:
        whole = sample
    return StepEnd((whole,), arguments, _sigma(noise_scheduler), lambda: None)


def _end(noise_scheduler: Any, result: Any, before: int | None, arguments: Mapping[str, Any]) -> StepEnd:
    """What there is to tell of a step that began at the index ``before``."""
    after = getattr(noise_scheduler, "step_index", None)
    index = after - 1 if before is None and after is not None else before
    own = functools.partial(estimate, noise_scheduler, result, index, arguments)
    return StepEnd(result, arguments, _sigma(noise_scheduler), own)


class _ObservedMeta(type):
    """Makes an observed class equal to the one that it stands for: Bria asks ``type(scheduler) != ...``."""

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is cls.__mro__[1]

    def __hash__(cls) -> int:
        return hash(cls.__mro__[1])


def _sigma(noise_scheduler: Any) -> float | None:
    """The noise level at the scheduler's current step index, where it keeps sigmas on the host."""
    sigmas, index = getattr(noise_scheduler, "sigmas", None), getattr(noise_scheduler, "step_index", None)
    if sigmas is None or not isinstance(sigmas, torch.Tensor) or sigmas.device.type != "cpu":
        return None
    if index is None:
        index = getattr(noise_scheduler, "begin_index", None) or 0
    on_host = columns(noise_scheduler, as_they_are)["sigmas"]
    return on_host[min(int(index), len(on_host) - 1)]
