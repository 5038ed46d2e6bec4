"""Workloads: who asks when, for what. Arrival times, and the design's W1 to W4.

Pure Python without numpy, and the same on every machine: all chance comes from :class:`random.Random` objects that are
seeded with ``seed`` and the name of what they draw. So arrival times and sizes do not depend on each other: W1 and W2
of one seed ask for the same sizes in the same order, and another ``rate`` only stretches the times.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from steploom.errors import ConfigError

SIZES = (512, 768, 1024, 1536)
"""Pixels of the four classes of W1 and W2, from the smallest."""
SMALL_SIZES = (32, 48, 64, 96)
"""What the built-in model on a CPU takes in place of :data:`SIZES`."""
STEPS = (20, 20, 25, 35)
"""Steps of the four classes."""
SHARES = (0.15, 0.25, 0.45, 0.15)
"""Shares of the four classes: those of GENSERVE's and others' "Dataset C" (design, section 9)."""
BURSTY_CV = 1.64
"""Coefficient of variation of the gaps between W2's arrivals."""

_SUCCEEDED = ("succeed", "succeeded", "success", "successful", "completed", "ok")


@dataclasses.dataclass(frozen=True)
class Arrival:
    """One request of a workload.

    Attributes:
        at_s: Seconds after the workload's start at which it is sent.
        width: Pixels.
        height: Pixels.
        steps: ``num_inference_steps``.
        images: ``num_images_per_prompt``.
        user: Who asks, for fairness; None is nobody in particular.
        priority: Lower runs first.
        deadline: Seconds from submission, a hint to the scheduler; None where it has none.
    """

    at_s: float
    width: int
    height: int
    steps: int
    images: int = 1
    user: str | None = None
    priority: int = 0
    deadline: float | None = None


def poisson(n: int, rate: float, seed: int) -> list[float]:
    """Arrival times of a Poisson process: seconds, ascending, ``n`` of them.

    Args:
        n: How many.
        rate: Requests a second on average; ``inf`` has all of them at 0.
        seed: Of the random numbers.

    Raises:
        ConfigError: ``n`` or ``rate`` is out of range.
    """
    return gamma(n, rate, 1.0, seed)


def gamma(n: int, rate: float, cv: float, seed: int) -> list[float]:
    """Arrival times whose gaps are gamma distributed: seconds, ascending, ``n`` of them.

    Gaps have mean ``1 / rate`` and standard deviation ``cv / rate``: 1 is a Poisson process, more is burstier, 0 is a
    metronome. Shape ``1 / cv**2`` and scale ``cv**2 / rate``, as vLLM's ``bench serve --burstiness`` has it, whose
    burstiness is our shape.

    Args:
        n: How many.
        rate: Requests a second on average; ``inf`` has all of them at 0.
        cv: Coefficient of variation of the gaps.
        seed: Of the random numbers.

    Raises:
        ConfigError: ``n``, ``rate`` or ``cv`` is out of range.
    """
    _check(n, rate)
    if not (math.isfinite(cv) and cv >= 0):
        raise ConfigError(f"cv={cv!r}: must be a finite number of at least 0; 1 is a Poisson process")
    chance, now, times = random.Random(f"{seed} arrivals"), 0.0, list[float]()
    for _ in range(n):
        if cv == 0 or math.isinf(rate):
            now += 1 / rate
        elif cv == 1:
            now += chance.expovariate(1.0) / rate
        else:
            now += chance.gammavariate(cv**-2, cv**2) / rate
        times.append(now)
    return times


def w1(n: int, rate: float, seed: int, sizes: Sequence[int] = SIZES) -> list[Arrival]:
    """Workload W1, "Dataset C": four sizes, 15, 25, 45 and 15% of 20, 20, 25 and 35 steps, Poisson arrivals.

    Args:
        n: Requests.
        rate: Requests a second on average.
        seed: Of times and sizes.
        sizes: Pixels of the four classes, from the smallest; :data:`SMALL_SIZES` for the built-in model.

    Raises:
        ConfigError: An argument is out of range.
    """
    return mixed(poisson(n, rate, seed), seed, sizes)


def w2(n: int, rate: float, seed: int, sizes: Sequence[int] = SIZES) -> list[Arrival]:
    """Workload W2: W1 with bursts, gamma arrivals of coefficient of variation 1.64.

    Args:
        n: Requests.
        rate: Requests a second on average.
        seed: Of times and sizes.
        sizes: Pixels of the four classes, from the smallest. A single one: 512 alone is ``sizes=(512,)``, 20 steps.

    Raises:
        ConfigError: An argument is out of range.
    """
    return mixed(gamma(n, rate, BURSTY_CV, seed), seed, sizes)


def w3(path: str | Path, n: int | None, seed: int, rate: float, sizes: Sequence[int] = (512, 1024)) -> list[Arrival]:
    """Workload W3: a replay of a CSV of the GenTD26 form, its time compressed to a mean rate.

    Arrivals, users, steps and images per request are the file's. It has no resolutions: the sizes are dealt out in
    equal shares, at random. Rows that did not succeed and rows without steps are left out, since nobody knows what
    they would have cost. A file of fewer than ``n`` rows is replayed again from its start.

    Args:
        path: The file, with columns ``arrival_s`` and ``num_inference_steps``, and ``user``, ``num_images`` and
            ``status`` if it has them; others are not read.
        n: Requests, the file's first; None takes all.
        seed: Of the sizes.
        rate: Requests a second on average over the whole replay.
        sizes: Pixels.

    Raises:
        ConfigError: An argument is out of range, or the file cannot be understood: it names the file, line and column.
    """
    rows = read_trace(path)
    many = len(rows) if n is None else n
    _check(many, rate)
    span = rows[-1].at_s - rows[0].at_s
    period = span + (span / (len(rows) - 1) if len(rows) > 1 else 1.0)  # a mean gap between one replay and the next
    times = [rows[i % len(rows)].at_s - rows[0].at_s + i // len(rows) * period for i in range(many)]
    slower = (many - 1) / rate / times[-1] if times[-1] > 0 else 0.0
    pixels = deal(sizes, [1.0] * len(sizes), many, seed)
    return [
        dataclasses.replace(rows[i % len(rows)], at_s=times[i] * slower, width=size, height=size)
        for i, size in enumerate(pixels)
    ]


def w4(n: int = 24, size: int = 512, steps: int = 4) -> list[Arrival]:
    """Workload W4: a burst of ``n`` equal requests, all at 0."""
    _check(n, 1.0)
    return [Arrival(0.0, size, size, steps) for _ in range(n)]


def mixed(times: Sequence[float], seed: int, sizes: Sequence[int] = SIZES) -> list[Arrival]:
    """Requests of the four classes of "Dataset C" at the given times.

    Raises:
        ConfigError: There are more sizes than classes.
    """
    if not 0 < len(sizes) <= len(STEPS):
        raise ConfigError(f"sizes={tuple(sizes)!r}: must be one to {len(STEPS)} sizes, from the smallest")
    classes = deal(range(len(sizes)), SHARES[: len(sizes)], len(times), seed)
    return [Arrival(at, sizes[kind], sizes[kind], STEPS[kind]) for at, kind in zip(times, classes, strict=True)]


def deal(values: Sequence[int], shares: Sequence[float], n: int, seed: int) -> list[int]:
    """``n`` of the values in random order, as many of each as its share says.

    Numbers and not probabilities, so that the demand of a workload is the same for every seed: the largest remainders
    are rounded up.

    Raises:
        ConfigError: There are no values.
    """
    if not values:
        raise ConfigError(f"sizes={values!r}: must be at least one size")
    exact = [n * share / sum(shares) for share in shares]
    counts = [math.floor(part) for part in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: n - sum(counts)]:
        counts[i] += 1
    dealt = [value for value, count in zip(values, counts, strict=True) for _ in range(count)]
    random.Random(f"{seed} sizes").shuffle(dealt)
    return dealt


def read_trace(path: str | Path) -> list[Arrival]:
    """The requests of a CSV of the GenTD26 form that succeeded and have steps, by arrival; width and height are 0.

    Raises:
        ConfigError: The file cannot be read or understood; it names the file, line and column.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            names = reader.fieldnames or ()
            for name in ("arrival_s", "num_inference_steps"):
                if name not in names:
                    has = ", ".join(names) or "nothing"
                    raise ConfigError(f"{path}, line 1: there is no column {name}; it has {has}")
            rows = list(_arrivals(path, reader))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: cannot be read as CSV: {error}") from None
    if not rows:
        raise ConfigError(f"{path}: has no row that succeeded and has num_inference_steps; give another file")
    return sorted(rows, key=lambda row: row.at_s)


def _arrivals(path: str | Path, reader: csv.DictReader[str]) -> Iterable[Arrival]:
    """The rows that count."""
    for row in reader:
        where = f"{path}, line {reader.line_num}"
        status = (row.get("status") or _SUCCEEDED[0]).strip().lower()
        steps = _number(where, row, "num_inference_steps", 0.0)
        at = _number(where, row, "arrival_s", None)
        images = _number(where, row, "num_images", 1.0)
        if status in _SUCCEEDED and steps and images:
            yield Arrival(at, 0, 0, int(steps), int(images), (row.get("user") or "").strip() or None)


def _number(where: str, row: Mapping[str, str | None], column: str, default: float | None) -> float:
    """A number of a row that is not negative, whole unless it is a time; ``default`` where the row has none.

    Raises:
        ConfigError: It is not one.
    """
    text = (row.get(column) or "").strip()
    if not text and default is not None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    whole = column != "arrival_s"
    if not (math.isfinite(value) and value >= 0) or (whole and value != int(value)):
        meaning = "a whole number" if whole else "a number of seconds"
        raise ConfigError(f"{where}, column {column}: {text!r} is not {meaning} of at least 0; mend or drop the row")
    return value


def _check(n: int, rate: float) -> None:
    if n < 1:
        raise ConfigError(f"n={n!r}: must be at least 1 request")
    if not rate > 0:  # as with nan
        raise ConfigError(f"rate={rate!r}: must be greater than 0 requests a second")
