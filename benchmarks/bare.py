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


def allowed(pipe: Any, arguments: dict[str, Any], requests: int, steps: int) -> dict[str, float]:
    """Seconds that a burst needs at least: forwards and decodes, each at the number of requests that is best for it.

    Args:
        pipe: Of the built-in model's class.
        arguments: Of its call: the size among them.
        requests: Of the burst.
        steps: Of each.

    Returns:
        ``forward_s`` and ``decode_s`` of all, ``seconds`` their sum, and ``with_encode_s``, which adds the text
        encoders once for each request, since their prompts differ.
    """
    forward = min(cost / count for count, cost in _costs(pipe, "transformer", "forward", arguments, requests).items())
    decode = min(cost / count for count, cost in _costs(pipe, "vae", "decode", arguments, requests).items())
    encode = 0.0
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        if getattr(pipe, name, None) is not None:
            encode += min(c / n for n, c in _costs(pipe, name, "forward", arguments, requests).items())
    total = requests * (steps * forward + decode)
    return {
        "forward_s": requests * steps * forward,
        "decode_s": requests * decode,
        "encode_s": requests * encode,
        "seconds": total,
        "with_encode_s": total + requests * encode,
    }


def knee(pipe: Any, arguments: dict[str, Any], share: float = 0.95) -> tuple[int, dict[int, float]]:
    """The least batch that has ``share`` of the best throughput; and seconds per request by batch."""
    costs = {n: cost / n for n, cost in _costs(pipe, "transformer", "forward", arguments, max(BATCHES)).items()}
    best = min(costs.values())
    return next(count for count, cost in costs.items() if cost <= best / share), costs
