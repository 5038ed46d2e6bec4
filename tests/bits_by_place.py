"""A program: the bits of one request with ``batch_invariant``, in each place of a batch, at so many torch threads.

    python tests/bits_by_place.py sd3 2 4

What it prints is JSON: whether the bits were those of the request alone, by place, and what happened to the calls.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import tiny
import torch
from driving import Driver, config, request, tensor_of

from steploom.worker.runner import Runner

SIZES: dict[str, dict[str, Any]] = {
    "sd3": {"height": 32, "width": 32, "max_sequence_length": 16, "guidance_scale": 4.0},
    "sdxl": {"height": 32, "width": 32, "guidance_scale": 4.0},
    "flux": {"height": 32, "width": 32, "max_sequence_length": 16},
    "wan": {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 16},
}


def main(name: str, threads: int, most: int) -> None:
    torch.set_num_threads(threads)
    pipe = getattr(tiny, name)()

    def drawn(place: int, company: int) -> tuple[Any, Driver]:
        driver = Driver(Runner.from_pipeline(pipe, config(batch_invariant=True, max_batch=most)))
        asked = [request(f"mate{n}", "two boats", n, num_inference_steps=2, **SIZES[name]) for n in range(company)]
        asked.insert(place, request("watched", "a cat", 10, num_inference_steps=2, **SIZES[name]))
        driver.drain(asked)
        return tensor_of(driver.finished["watched"].output), driver

    lonely, _ = drawn(0, 0)
    found = [drawn(place, most - 1) for place in range(most)]
    driver = found[0][1]
    print(
        json.dumps(
            {
                "same": [torch.equal(output, lonely) for output, _ in found],
                "shared": max(driver.sharing("watched")),
                "kinds": sorted(set(driver.runner.stats().kinds.values())),
                "alone": driver.runner.stats().alone_calls,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
