"""A peer's side: a process of its own, in an interpreter of its own, that runs workloads when told so.

    python -m peers.speak peers.drive_pipe

JSON lines on stdin and stdout. What the peer's libraries print goes to stderr, so that it is not taken for an answer.

``{"do": "start", "checkpoint": folder, "settings": {...}}``  ->  ``{"ok": {"versions": {...}}}``
``{"do": "run", "requests": [...], "keep": folder | null}``   ->  ``{"ok": {"results": [...]}}``
``{"do": "stop"}``                                            ->  ``{"ok": {}}``, and the process ends

Each result: ``id``, ``due_s``, ``ended_s`` (both after the start of the workload), ``error`` (null or text) and
``latents`` (a file, or null). What cannot be done is answered with ``{"error": text}``. Standard library only, and
Python 3.10, since it runs in the peer's environment; a driver imports what it needs in ``start``.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any


async def run(driver: Any, items: list[dict[str, Any]], keep: str | None) -> list[dict[str, Any]]:
    """Submits each request when it is due; a refused one concerns nobody else."""
    began = time.monotonic()

    async def one(item: dict[str, Any]) -> dict[str, Any]:
        await asyncio.sleep(max(0.0, began + item["arrival_s"] - time.monotonic()))
        due, latents, error = time.monotonic() - began, None, None
        try:
            latents = await driver.generate(item)
        except Exception as fault:  # noqa: BLE001 - whatever a peer says no with is its answer
            error = f"{type(fault).__name__}: {fault}"[:500]
        return {"id": item["id"], "due_s": due, "ended_s": time.monotonic() - began, "error": error, "made": latents}

    results = await asyncio.gather(*(one(item) for item in items))
    for result in results:  # written when all are done: no engine waits for a disk
        made = result.pop("made")
        result["latents"] = None if made is None or keep is None else _written(made, Path(keep) / f"{result['id']}.npy")
    return list(results)


def _written(latents: Any, path: Path) -> str:
    import numpy

    numpy.save(path, latents)
    return str(path)


async def answer(driver: Any, order: dict[str, Any]) -> dict[str, Any]:
    """Does what an order says."""
    if order["do"] == "start":
        return {"versions": await driver.start(order["checkpoint"], order["settings"])}
    if order["do"] == "run":
        return {"results": await run(driver, order["requests"], order.get("keep"))}
    if order["do"] == "stop":
        await driver.stop()
        return {}
    raise ValueError(f"do={order['do']!r}: 'start', 'run' or 'stop'")


async def serve(driver: Any, replies: Any) -> None:
    """Answers orders until one says stop, or stdin ends."""
    loop, order = asyncio.get_running_loop(), {}
    while order.get("do") != "stop":
        line = await loop.run_in_executor(None, sys.stdin.readline)
        order = json.loads(line) if line else {"do": "stop"}
        try:
            reply = {"ok": await answer(driver, order)}
        except Exception as fault:  # noqa: BLE001 - the process boundary: told
            traceback.print_exc()
            reply = {"error": f"{type(fault).__name__}: {fault}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def main() -> None:
    """Keeps stdout for answers, and gives everybody else stderr in its place."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout.reconfigure(line_buffering=True)  # what a peer that dies has said last is not lost
    driver = importlib.import_module(sys.argv[1]).Driver()
    asyncio.run(serve(driver, replies))


if __name__ == "__main__":
    main()
