"""The machine: its clock, its name, and what it could do at most."""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import platform
import statistics
import time
from typing import Any

import torch

PEAKS = {
    "H200": (989.4e12, "https://www.nvidia.com/en-us/data-center/h200/"),
    "H100 PCIe": (756.5e12, "https://www.nvidia.com/en-us/data-center/h100/"),
    "H100 NVL": (835.5e12, "https://www.nvidia.com/en-us/data-center/h100/"),
    "H100": (989.4e12, "https://www.nvidia.com/en-us/data-center/h100/"),
    "A100": (312e12, "https://www.nvidia.com/en-us/data-center/a100/"),
    "L40S": (362.05e12, "https://www.nvidia.com/en-us/data-center/l40s/"),
    "RTX 4090": (165.2e12, "NVIDIA Ada GPU architecture whitepaper, appendix A (float32 accumulation)"),
}
"""Dense bfloat16 and float16 operations a second by part of the device's name, the first that fits, and who says so.

The sheets of data-centre parts give twice as much, "with sparsity"; these are the halves.
"""

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "steploom")


class Clock:
    """Wall time of work on a device.

    On CUDA a mark is an event in the current stream, so that it says when the device came there and not when it was
    asked to; on the CPU it is the time.
    """

    def __init__(self, device: str) -> None:
        self.cuda = torch.device(device).type == "cuda"

    def mark(self) -> Any:
        """A point in the device's work; compare it with others after :meth:`sync`."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, first: Any, last: Any) -> float:
        """Seconds from one mark to another."""
        return first.elapsed_time(last) / 1000 if self.cuda else last - first

    def sync(self) -> None:
        """Returns when the device is done with everything that it was asked to do."""
        if self.cuda:
            torch.cuda.synchronize()

    def now(self) -> float:
        """Seconds, once the device is done."""
        self.sync()
        return time.perf_counter()


class Forwards:
    """Context manager that marks the beginning and the end of each forward of a module, and how many rows it had.

    The hooks are on the real module, which both ``pipe(...)`` and the engine call.
    """

    def __init__(self, module: Any, clock: Clock) -> None:
        self._module, self._clock = module, clock
        self._open: list[tuple[Any, int]] = []
        self.marks: list[tuple[Any, Any, int]] = []

    def __enter__(self) -> Forwards:
        self._hooks = [
            self._module.register_forward_pre_hook(self._begin, with_kwargs=True),
            self._module.register_forward_hook(self._end),
        ]
        return self

    def __exit__(self, *exc: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _begin(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))
        self._open.append((self._clock.mark(), len(first)))

    def _end(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        if not self._open:  # the hooks came while this forward ran, in the engine's worker thread
            return
        began, rows = self._open.pop()
        self.marks.append((began, self._clock.mark(), rows))

    def steady(self, rows: int) -> tuple[list[float], list[float]]:
        """Seconds inside each forward of at least that many rows but the first, and from start to start."""
        self._clock.sync()
        full = [(began, ended) for began, ended, count in self.marks if count >= rows][1:]
        inside = [self._clock.between(began, ended) for began, ended in full]
        periods = [self._clock.between(one[0], other[0]) for one, other in itertools.pairwise(full)]
        return inside, periods


def hardware(device: str) -> dict[str, Any]:
    """What the figures were measured on."""
    found: dict[str, Any] = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "cuda": torch.version.cuda,
            "capability": f"{properties.major}.{properties.minor}",
        }
    return {**found, "torch_threads": torch.get_num_threads()}


def short_name(device: str) -> str:
    """What a file of figures is named after."""
    if torch.device(device).type != "cuda":
        return torch.device(device).type
    name = torch.cuda.get_device_name(device)
    known = [part for part in PEAKS if part in name]
    return (known[0] if known else name.removeprefix("NVIDIA ")).lower().replace(" ", "-")


def versions() -> dict[str, str]:
    """Of what matters to the figures."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout
            found[package] = "not installed"
    return found


def peak(device: str, dtype: str) -> dict[str, Any]:
    """Operations a second that the device can do at most: of its data sheet, else of the best matrix product here."""
    if torch.device(device).type == "cuda" and dtype != "float32":
        name = torch.cuda.get_device_name(device)
        for part, (flops, source) in PEAKS.items():
            if part in name:
                return {"flops": flops, "source": source}
    return {"flops": matmul_flops(device, dtype), "source": "best matrix product measured in this run"}


def matmul_flops(device: str, dtype: str) -> float:
    """Operations a second of a large square matrix product, the best of ten."""
    clock, width = Clock(device), 8192 if torch.device(device).type == "cuda" else 512
    one = torch.randn(width, width, device=device, dtype=getattr(torch, dtype))
    torch.mm(one, one)
    times: list[float] = []
    for _ in range(10):
        began = clock.now()
        torch.mm(one, one)
        times.append(clock.now() - began)
    return 2 * width**3 / min(times)


def free_bytes(device: str) -> int | None:
    """Memory that is free on the device; None for a CPU, where tiny models run."""
    return torch.cuda.mem_get_info(device)[0] if torch.device(device).type == "cuda" else None


def median(values: list[float]) -> float:
    """The median; nan of nothing."""
    return statistics.median(values) if values else float("nan")
