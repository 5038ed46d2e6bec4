"""Goodput: the highest load at which enough requests finish in time."""

from __future__ import annotations

from collections.abc import Callable

LEAST, MOST = 1 / 64, 64.0


def highest_load(attained: Callable[[float], float], target: float = 0.9, tolerance: float = 0.02) -> float:
    """Bisects for the highest load at which ``attained(load) >= target``, from 0.5 outwards.

    Attainment falls with load but for chance, so what is found is a load at which it still holds and by at most
    ``tolerance`` (a share of it) above which it does not.

    Returns:
        0 if it holds not even at a load of 1/64; 64 if it holds there.
    """
    low, high = 0.5, 1.0
    if attained(low) < target:
        while True:
            low, high = low / 2, low
            if low < LEAST:
                return 0.0
            if attained(low) >= target:
                break
    else:
        while attained(high) >= target:
            if high >= MOST:
                return MOST
            low, high = high, 2 * high
    while high > low * (1 + tolerance):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if attained(middle) >= target else (low, middle)
    return low
