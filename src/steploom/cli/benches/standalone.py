"""How long each request of a workload takes when nothing else runs: what slowdown and attainment are measured by."""

from __future__ import annotations

import collections
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

from steploom.cli.benches.load import Target
from steploom.cli.benches.workloads import Arrival


@dataclasses.dataclass(frozen=True)
class Standalone:
    """Seconds of a request alone.

    Requests of one size cost ``a + b * steps + c * images + d * steps * images``, so four measurements of a size
    tell all others: the fewest and the most steps with the fewest and the most images.

    Attributes:
        measured: Seconds by ``(width, height, steps, images)``.
    """

    measured: dict[tuple[int, int, int, int], float]

    def seconds(self, arrival: Arrival) -> float:
        """Of a request of a measured size, between the corners.

        Raises:
            KeyError: Nothing of that size was measured.
        """
        size = (arrival.width, arrival.height)
        found = {key[2:]: value for key, value in self.measured.items() if key[:2] == size}
        if (arrival.steps, arrival.images) in found:
            return found[arrival.steps, arrival.images]
        if not found:
            raise KeyError(f"nothing of {size[0]}x{size[1]} was measured alone")
        steps, images = [sorted({key[axis] for key in found}) for axis in (0, 1)]
        right, up = _place(arrival.steps, steps), _place(arrival.images, images)
        low, high = (
            found[steps[0], row] + right * (found[steps[-1], row] - found[steps[0], row])
            for row in (images[0], images[-1])
        )
        return low + up * (high - low)

    def mean(self, arrivals: Sequence[Arrival]) -> float:
        """Seconds of a request on average: its inverse is the serial capacity, in requests a second."""
        return statistics.mean(self.seconds(arrival) for arrival in arrivals)


def corners(arrivals: Sequence[Arrival]) -> list[Arrival]:
    """The requests that are to be measured: of each size the fewest and the most steps, and images."""
    sizes: dict[tuple[int, int], list[Arrival]] = collections.defaultdict(list)
    for arrival in arrivals:
        sizes[arrival.width, arrival.height].append(arrival)
    found: list[Arrival] = []
    for (width, height), members in sorted(sizes.items()):
        steps = sorted({f(one.steps for one in members) for f in (min, max)})
        images = sorted({f(one.images for one in members) for f in (min, max)})
        found += [Arrival(0.0, width, height, step, image) for step in steps for image in images]
    return found


async def measure(
    target: Target,
    arrivals: Sequence[Arrival],
    *,
    repeats: int = 3,
    first: int = 1_000_000,
    now: Callable[[], float] = time.monotonic,
) -> Standalone:
    """Sends the corners of a workload one after the other, in turns, and takes medians.

    Args:
        target: What is measured.
        arrivals: The workload.
        repeats: How often each is sent.
        first: Index of the first request; the workload's own prompts and seeds are not to be known yet.
        now: The clock.

    Raises:
        Exception: What the target raises: a workload that fails alone needs no load.
    """
    took: dict[tuple[int, int, int, int], list[float]] = collections.defaultdict(list)
    index = first
    for _ in range(repeats):
        for one in corners(arrivals):
            began = now()
            await target.send(index, one)
            took[one.width, one.height, one.steps, one.images].append(now() - began)
            index += 1
    return Standalone({key: statistics.median(values) for key, values in took.items()})


def _place(value: int, ends: Sequence[int]) -> float:
    """Where a value lies between the ends, 0 to 1."""
    return (value - ends[0]) / (ends[-1] - ends[0]) if ends[-1] > ends[0] else 0.0
