"""The clauses about outputs: whose they are, and that company does not change that."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from steploom.testing.subject import Subject, together

if TYPE_CHECKING:
    import numpy as np

Draw = Callable[[Sequence[int]], Awaitable[list[Any]]]
"""The outputs of requests with these seeds, made at the same time."""

SEEDS = (1, 2, 3, 1)
"""Of the requests that are compared. Whoever gives each the output of another is seen by it, in whatever order."""
DEPTH = 8
"""How deep it is looked into what they are made of."""


async def company_of_steps(subject: Subject) -> None:
    """Requests that share their ticks."""

    async def draw(seeds: Sequence[int]) -> list[Any]:
        news = [subject.new(seed) for seed in seeds]
        runs = [new.run_id for new in news]
        done = await subject.finish(runs, await subject.tick(*news))
        return [done[run].output for run in runs]

    await _compare(subject, draw)


async def company_of_requests(subject: Subject) -> None:
    """Requests that are asked for at the same time, each by a call of its own."""

    async def draw(seeds: Sequence[int]) -> list[Any]:
        asked = [subject.request(seed) for seed in seeds]
        with subject.clause("whole requests" if len(asked) == 1 else "in company"):
            answers = await together(*[lambda one=one: subject.executor.execute_model([one]) for one in asked])
            for answer in answers:
                if isinstance(answer, Exception):
                    raise answer
        found = [output.request_id for answer in answers for output in answer]
        ids = [request.request_id for request in asked]
        subject.require(found == ids, "in company", f"the outputs of {ids} came as {found}")
        return [output.output for answer in answers for output in answer]

    await _compare(subject, draw)


async def _compare(subject: Subject, draw: Draw) -> None:
    """Alone, the same request comes out the same; among others, it comes out as itself more than as any of them.

    Nearer, and not equal: whoever shares forwards rounds otherwise than who is alone.
    """
    alone = [(await draw([seed]))[0] for seed in SEEDS]
    told = "two equal requests had different outputs"
    subject.require(distance(alone[0], alone[-1]) == 0, "same request, same output", told)
    seeds = SEEDS[: subject.config.batch_limit]
    for place, output in enumerate(await draw(seeds)):
        apart = [distance(output, other) for other in alone]
        nearest = SEEDS[apart.index(min(apart))]
        told = f"the output of seed {seeds[place]}, made with those of {seeds}, is that of seed {nearest} alone"
        subject.require(apart[place] <= min(apart), "in company", told)


def distance(one: Any, other: Any, depth: int = DEPTH) -> float:
    """How far apart two outputs are: the mean differences of their pictures and tensors, and 1 for what else differs.

    0 if they are equal; infinity if they cannot be compared.
    """
    if one is other:
        return 0.0
    if type(one) is not type(other):
        return math.inf
    numbers = _numbers(one), _numbers(other)
    if numbers[0] is not None and numbers[1] is not None:
        return _between(numbers[0], numbers[1])
    parts = (_parts(one), _parts(other)) if depth else (None, None)
    if parts[0] is None or parts[1] is None:
        return float(one != other)
    if len(parts[0]) != len(parts[1]):
        return math.inf
    return sum(distance(mine, theirs, depth - 1) for mine, theirs in zip(parts[0], parts[1], strict=True))


def _numbers(value: Any) -> np.ndarray[Any, np.dtype[np.float64]] | None:
    """A picture, a tensor or an array as numbers: whoever holds one has numpy."""
    if hasattr(value, "detach"):  # a tensor; numpy has no bfloat16
        value = value.detach().cpu().double()
    if not (hasattr(value, "__array__") or hasattr(value, "__array_interface__")):  # a picture has the latter
        return None
    import numpy as np

    try:
        return np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        return None


def _between(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    if one.shape != other.shape:
        return math.inf
    import numpy as np

    if np.array_equal(one, other, equal_nan=True):
        return 0.0
    apart = float(np.mean(np.abs(one - other)))
    return apart if math.isfinite(apart) else math.inf


def _parts(value: Any) -> list[Any] | None:
    """What a value is made of, if it is made of anything."""
    if isinstance(value, Mapping):
        named = cast("Mapping[Any, Any]", value)
        return [*named.keys(), *named.values()]
    if isinstance(value, (list, tuple)):
        return list(cast("Sequence[Any]", value))
    fields = getattr(value, "__dict__", None)
    return [*fields.keys(), *fields.values()] if fields else None
