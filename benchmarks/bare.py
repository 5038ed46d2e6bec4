"""What the bare modules allow: merged forwards of the denoiser, decodes and text encoders, outside of any pipeline."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

BATCHES = (1, 2, 4, 8, 12, 16, 24, 32)
"""Requests of a merged forward that are tried."""


def captured(pipe: Any, module: str, method: str, arguments: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the first real call of a module's method, in a request of one step."""
    owner, seen = getattr(pipe, module), []
    real = getattr(owner, method)

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append((args, kwargs))
        return real(*args, **kwargs)

    setattr(owner, method, spy)
    try:
        pipe("a large red circle on a white background", **{**arguments, "num_inference_steps": 1})
    finally:
        delattr(owner, method)
    return seen[0]


def merged(call: tuple[tuple[Any, ...], dict[str, Any]], requests: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call for so many requests."""

    def many(value: Any) -> Any:
        return torch.cat([value] * requests) if isinstance(value, torch.Tensor) and value.ndim else value

    return tuple(map(many, call[0])), {name: many(value) for name, value in call[1].items()}


def seconds(function: Callable[[], Any], repeats: int = 5) -> float:
    """The median of some calls, after one that is not counted."""
    times: list[float] = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        with torch.no_grad():
            function()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def _costs(pipe: Any, module: str, method: str, arguments: dict[str, Any], most: int) -> dict[int, float]:
    """Seconds of a merged call by requests."""
    call = captured(pipe, module, method, arguments)
    real = getattr(getattr(pipe, module), method)
    found: dict[int, float] = {}
    for count in BATCHES:
        if count <= most:
            args, kwargs = merged(call, count)
            found[count] = seconds(lambda args=args, kwargs=kwargs: real(*args, **kwargs))
    return found


class Ceiling:
    """What a burst of requests needs at least: each module at the number of requests that is best for it.

    Args:
        pipe: Of the built-in model's class.
        arguments: Of its call: the size among them.
        requests: Of the burst.
        steps: Of each.
    """

    def __init__(self, pipe: Any, arguments: dict[str, Any], requests: int, steps: int) -> None:
        self._requests, self._steps = requests, steps
        self._best: dict[str, tuple[int, Callable[[], Any]]] = {}
        encoders = [name for name in ("text_encoder", "text_encoder_2", "text_encoder_3") if getattr(pipe, name, None)]
        for module, method in (
            ("transformer", "forward"),
            ("vae", "decode"),
            *((name, "forward") for name in encoders),
        ):
            costs = _costs(pipe, module, method, arguments, requests)
            best = min(costs, key=lambda count: costs[count] / count)
            args, kwargs = merged(captured(pipe, module, method, arguments), best)
            real = getattr(getattr(pipe, module), method)
            self._best[module] = best, lambda real=real, args=args, kwargs=kwargs: real(*args, **kwargs)

    def measure(self) -> dict[str, float]:
        """Seconds of all requests: ``forward_s``, ``decode_s``, ``encode_s``; ``seconds`` is the first two together.

        ``with_encode_s`` adds the text encoders, once for each request, since their prompts differ.
        """
        each = {module: seconds(function, 3) / best for module, (best, function) in self._best.items()}
        forward, decode = self._requests * self._steps * each.pop("transformer"), self._requests * each.pop("vae")
        encode = self._requests * sum(each.values())
        return {
            "forward_s": forward,
            "decode_s": decode,
            "encode_s": encode,
            "seconds": forward + decode,
            "with_encode_s": forward + decode + encode,
        }


def knee(pipe: Any, arguments: dict[str, Any], share: float = 0.95) -> tuple[int, dict[int, float]]:
    """The least batch that has ``share`` of the best throughput; and seconds per request by batch."""
    costs = {n: cost / n for n, cost in _costs(pipe, "transformer", "forward", arguments, max(BATCHES)).items()}
    best = min(costs.values())
    return next(count for count, cost in costs.items() if cost <= best / share), costs
