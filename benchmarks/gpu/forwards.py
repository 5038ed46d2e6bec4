"""The bare denoiser: what one forward costs by rows. This is the ceiling of every engine."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from gpu.budget import Budget
from gpu.machine import Clock, Forwards, median

ROWS = (1, 2, 4, 8, 16)
REPEATS = 7
LEAST_REPEATS = 3

Call = tuple[tuple[Any, ...], dict[str, Any]]


def captured(pipe: Any, module: Any, arguments: dict[str, Any]) -> Call:
    """Positional and keyword arguments of the first real call of ``module``."""
    seen: list[Call] = []
    hook = module.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    try:
        pipe(**arguments, num_inference_steps=2, output_type="latent", generator=torch.Generator().manual_seed(0))
    finally:
        hook.remove()
    return seen[0]


def widened(value: Any, given: int, rows: int) -> Any:
    """A call's arguments with the first row of everything that has ``given`` rows repeated ``rows`` times.

    Tensors without a batch axis (ids of positions, a timestep without dimensions) stay as they are.
    """
    if isinstance(value, torch.Tensor):
        if value.ndim == 0 or len(value) != given:
            return value
        return value[:1].repeat(rows, *(1,) * (value.ndim - 1)).contiguous()
    if isinstance(value, dict):
        return {key: widened(entry, given, rows) for key, entry in value.items()}
    if isinstance(value, list) and len(value) == given:
        return [value[0]] * rows
    if isinstance(value, tuple):
        return tuple(widened(entry, given, rows) for entry in value)
    return value


def flops_of(module: Any, call: Call, given: int, rows: int = 1) -> int:
    """Floating-point operations of one forward of ``rows`` rows: matrix products, convolutions, attention."""
    own = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention}
    counter = FlopCounterMode(display=False, custom_mapping=own)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), counter:  # compiled code would not be seen
        _run(module, call, given, rows)
    return counter.get_total_flops()


def _cpu_attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """The counter knows CUDA's attention alone: its own formula, of shapes ``[rows, heads, tokens, width]``."""
    return sdpa_flop_count(query, key, value)


def _run(module: Any, call: Call, given: int, rows: int) -> Any:
    args, kwargs = widened(call, given, rows)
    return module(*args, **kwargs)


class Table:
    """Seconds of one bare forward by rows, measured in turns.

    Args:
        module: The denoiser.
        call: Its arguments, of ``given`` rows.
        given: Rows of ``call``.
        clock: Of the device.
    """

    def __init__(self, module: Any, call: Call, given: int, clock: Clock) -> None:
        self._module, self._call, self._given, self._clock = module, call, given, clock
        self.times: dict[int, list[float]] = {}
        self.finite = True

    def seconds(self, rows: int) -> float:
        """Median seconds of one forward."""
        return median(self.times[rows])

    def once(self, rows: int) -> float:
        """Measures one more."""
        args, kwargs = widened(self._call, self._given, rows)
        with torch.no_grad():
            began = self._clock.now()
            self._module(*args, **kwargs)
            seconds = self._clock.now() - began
        self.times.setdefault(rows, []).append(seconds)
        return seconds

    def warm(self, rows: int) -> float:
        """Not measured: the first call of a shape chooses kernels and takes memory. Says how long the second took."""
        args, kwargs = widened(self._call, self._given, rows)
        with torch.no_grad():
            output = self._module(*args, **kwargs)
            first = output[0] if isinstance(output, (tuple, list)) else output.sample
            self.finite = self.finite and bool(torch.isfinite(first).all())
            began = self._clock.now()
            self._module(*args, **kwargs)
        return self._clock.now() - began

    def fill(self, case: str, budget: Budget, rows: tuple[int, ...] = ROWS) -> None:
        """Measures every number of rows that memory and time allow, in turns."""
        there: list[int] = []
        each = 0.0
        for count in rows:
            expected = 2 * each * count * (1 + LEAST_REPEATS / 2)
            if not budget.allows(case, f"{count} rows", expected):
                continue
            try:
                each = self.warm(count) / count
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                budget.leave_out(case, f"{count} rows", "out of memory")
                continue
            there.append(count)
        for turn in range(REPEATS):
            if turn >= LEAST_REPEATS and budget.left < 4 * sum(self.seconds(count) for count in there):
                break
            for count in there:
                self.once(count)

    def figures(self, flops: int, peak: float) -> dict[str, Any]:
        """What is reported of it. ``flops`` are those of one row."""
        seconds = {rows: self.seconds(rows) for rows in sorted(self.times)}
        return {
            "flops_per_row": flops,
            "finite": self.finite,
            "knee_rows": knee(seconds),
            "rows": {
                str(rows): {
                    "step_ms": 1000 * spent,
                    "per_row_ms": 1000 * spent / rows,
                    "gain": seconds[min(seconds)] / min(seconds) / (spent / rows),
                    "mfu": flops * rows / spent / peak,
                }
                for rows, spent in seconds.items()
            },
        }


def knee(seconds: dict[int, float], gain: float = 0.05) -> int:
    """Rows beyond which the time of a row no longer falls by more than ``gain``.

    Args:
        seconds: Of one forward, by rows.
        gain: As a share.
    """
    counts = sorted(seconds)
    for here, beyond in itertools.pairwise(counts):
        if seconds[beyond] / beyond >= (1 - gain) * seconds[here] / here:
            return here
    return counts[-1]


def outside(forwards: Forwards, rows: int, calls_per_step: int = 1) -> dict[str, float]:
    """How much of the steady time is not inside a forward of all rows, and what that is in a tick.

    Args:
        forwards: Marked while the engine ran.
        rows: Of a full forward.
        calls_per_step: Forwards of one tick.
    """
    inside, periods = forwards.steady(rows)
    if not periods:
        return {}
    # each period begins with a forward: pair them, and leave the last forward, which no period covers
    spent, all_of_it = sum(inside[: len(periods)]), sum(periods)
    return {
        "outside_share": 1 - spent / all_of_it,
        "outside_ms_per_tick": 1000 * (all_of_it - spent) / len(periods) * calls_per_step,
        "tick_ms": 1000 * median(of_ticks(periods, calls_per_step)),
    }


def of_ticks(periods: list[float], calls_per_step: int) -> list[float]:
    """Seconds of whole ticks, of which each has that many forwards."""
    starts = range(0, len(periods) - calls_per_step + 1, calls_per_step)
    return [sum(periods[start : start + calls_per_step]) for start in starts]
