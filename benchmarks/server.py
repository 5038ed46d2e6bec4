"""The server under load, beside the engine in the same process: OpenAI's clients over TCP, the built-in model.

    python benchmarks/server.py [--requests 64] [--steps 10] [--rounds 3] [--save]

Two processes and a worker: ``steploom serve`` as users run it (its worker has one torch thread here) with a probe
in its event loop; and this one, which holds the clients, one ``AsyncOpenAI`` with a connection of its own for each
request. In each round three things take turns, forwards and backwards: ``engine.generate`` for all requests at
once, inside the server's process; the same number of clients at once; and the clients again while 1,000 idle
connections are open. So both sides have the same engine, worker and verified merges, and ratios are formed inside a
round. The clients' CPU time is not subtracted: it competes with the server's, as the ``cpu_s`` of each process show,
which makes a share too small rather than too large.

``share``          requests per second over HTTP against those of ``engine.generate``; at least 0.90.
``lag_p99_ms``     how late the server's event loop calls what is due every 5 ms, meanwhile; under 10.
``first_preview``  while 16 requests run: from a new request's sending to its first preview at its client, in steps of
                   that request, without the time of its text encoders; at most 2. ``ticks_ended`` counts the ticks
                   that ended meanwhile, the one that it came into included.
``slot_free``      while 16 run: from a client's hanging up to the end of the last tick that had its request, in ticks,
                   and how many ticks began with it after that; at most 1.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import os
import platform
import re
import resource
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

RESULTS = Path(__file__).parent / "results" / "server.json"
COMPANY = 16


def prompts(count: int, seed: list[int]) -> list[str]:
    """Prompts that were not asked for before (one in millions), so that no text encoder's result is known."""
    import numpy

    from steploom.demo import scene

    seed[0] += 1
    draw = numpy.random.default_rng(seed[0])
    return [scene.prompt(scene.random_scene(draw, pairs=1.0)) for _ in range(count)]


class Load:
    """The clients of one server."""

    def __init__(self, address: str, process: subprocess.Popen[str], options: argparse.Namespace) -> None:
        import httpx2
        import openai

        self.options, self.address = options, address
        self.plain = httpx2.AsyncClient(base_url=address, timeout=600)
        many = max(options.requests, COMPANY + 1)
        self.clients = [
            openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) for _ in range(many)
        ]
        self.drawn = [0]
        self.process = process

    async def close(self) -> None:
        await self.plain.aclose()
        for client in self.clients:
            await client.close()

    def cpu(self) -> dict[str, float]:
        """CPU seconds of each process so far."""
        import psutil

        server = psutil.Process(self.process.pid)
        worker = [child.cpu_times() for child in server.children(recursive=True)]
        own, theirs = psutil.Process().cpu_times(), server.cpu_times()
        return {
            "clients": own.user + own.system,
            "server": theirs.user + theirs.system,
            "worker": sum(one.user + one.system for one in worker),
        }

    async def direct(self, steps: int) -> dict[str, Any]:
        """``engine.generate`` in the server's process."""
        asked = [
            {"prompt": prompt, "seed": seed, "num_inference_steps": steps}
            for seed, prompt in enumerate(prompts(self.options.requests, self.drawn))
        ]
        before = self.cpu()
        found = (await self.plain.post("/probe/direct", json=asked)).raise_for_status().json()
        return {"per_s": self.options.requests / found["seconds"], "cpu_s": spent(before, self.cpu())}

    async def http(self, steps: int) -> dict[str, Any]:
        """The same by as many clients."""
        asked = prompts(self.options.requests, self.drawn)
        before = self.cpu()
        await self.plain.get("/probe/lag")
        started = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for seed, (client, prompt) in enumerate(zip(self.clients, asked, strict=False)):
                body = {"seed": seed, "num_inference_steps": steps}
                group.create_task(client.images.generate(prompt=prompt, extra_body=body))
        seconds = time.perf_counter() - started
        lag = (await self.plain.get("/probe/lag")).json()
        return {"per_s": self.options.requests / seconds, "lag_ms": lag, "cpu_s": spent(before, self.cpu())}

    @contextlib.asynccontextmanager
    async def company(self) -> AsyncIterator[None]:
        """So many requests run, and for long."""
        asked = prompts(COMPANY, self.drawn)
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(client.images.generate(prompt=prompt, extra_body={"num_inference_steps": 1000}))
                for client, prompt in zip(self.clients, asked, strict=False)
            ]
            while sum(entry["step"] > 0 for entry in await self.listed()) < COMPANY:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            yield
            for task in tasks:
                task.cancel()
        while await self.listed():  # noqa: ASYNC110
            await asyncio.sleep(0.05)

    async def listed(self) -> list[dict[str, Any]]:
        return (await self.plain.get("/v1/requests")).json()["data"]

    async def stream(self, user: str, steps: int) -> Any:
        (prompt,) = prompts(1, self.drawn)
        body = {"num_inference_steps": steps}
        return await self.clients[COMPANY].images.generate(
            prompt=prompt, stream=True, partial_images=3, user=user, extra_body=body
        )

    async def first_preview(self, encode_s: float) -> dict[str, float]:
        """A request of four steps has a preview at each of the first three."""
        sent = time.monotonic()  # the same clock in both processes
        stream, seen = await self.stream("preview", 4), []
        async for event in stream:
            seen.append((time.monotonic(), event))
        assert [event.step for _, event in seen] == [1, 2, 3, 4]
        assert base64.b64decode(seen[0][1].b64_json)
        until, step_s = seen[0][0], (seen[2][0] - seen[0][0]) / 2
        ticks = (await self.plain.get("/probe/between", params={"since": sent, "until": until})).json()
        seconds = until - sent
        return {"seconds": seconds, "step_s": step_s, "steps": (seconds - encode_s) / step_s, "ticks_ended": ticks}

    async def slot_free(self, index: int) -> dict[str, float]:
        """A client hangs up once its request runs."""
        user = f"gone-{index}"
        async with await self.stream(user, 8) as stream:  # its first preview is that of its second step
            await anext(aiter(stream))
            since = time.monotonic()
        found = (await self.plain.get("/probe/ticks", params={"user": user, "since": since})).json()
        return {**found, "steps": found["freed_s"] / found["tick_s"]}


def spent(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    return {name: round(after[name] - before[name], 2) for name in before}


@contextlib.contextmanager
def idle(address: str, count: int) -> Iterator[None]:
    """Connections that say nothing."""
    host, port = address.removeprefix("http://").rsplit(":", 1)
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(socket.create_connection((host, int(port))))
        yield


async def measure(load: Load) -> dict[str, Any]:
    options = load.options
    await load.direct(2)  # probing and verification
    await load.http(1)  # connections
    rounds: list[dict[str, Any]] = []
    for number in range(options.rounds):
        row: dict[str, Any] = {}
        for what in ("direct", "http", "idle")[:: 1 if number % 2 == 0 else -1]:
            with idle(load.address, options.idle) if what == "idle" else contextlib.nullcontext():
                row[what] = await (load.direct if what == "direct" else load.http)(options.steps)
        for what in ("http", "idle"):
            row[what]["share"] = row[what]["per_s"] / row["direct"]["per_s"]
        rounds.append(row)
        print(said(row), flush=True)
    found: dict[str, Any] = {"rounds": rounds, "medians": medians(rounds)}
    asked = {"prompt": prompts(1, load.drawn)[0], "num_inference_steps": 2}
    for what in ("alone", "idle"):
        with idle(load.address, options.idle) if what == "idle" else contextlib.nullcontext():
            async with load.company():
                encode = (await load.plain.post("/probe/direct", json=[asked])).json()["encode_s"]
                previews = [await load.first_preview(encode) for _ in range(options.tries)]
                slots = [await load.slot_free(index) for index in range(options.tries)]
        found[f"first_preview_{what}"] = {"encode_s": encode, **of_each(previews)}
        found[f"slot_free_{what}"] = of_each(slots)
        print(what, found[f"first_preview_{what}"]["steps"], found[f"slot_free_{what}"]["steps"], flush=True)
    return found


def of_each(rows: list[dict[str, float]]) -> dict[str, Any]:
    """Median and worst of each figure."""
    return {
        name: {"median": round(statistics.median(row[name] for row in rows), 4),
               "worst": round(max(row[name] for row in rows), 4)}
        for name in rows[0]
    }  # fmt: skip


def medians(rounds: list[dict[str, Any]]) -> dict[str, float]:
    found = {f"{what}_share": statistics.median(row[what]["share"] for row in rounds) for what in ("http", "idle")}
    for what in ("http", "idle"):
        found[f"{what}_lag_p99_ms"] = statistics.median(row[what]["lag_ms"]["p99"] for row in rounds)
    found["direct_per_s"] = statistics.median(row["direct"]["per_s"] for row in rounds)
    return {name: round(value, 3) for name, value in found.items()}


def said(row: dict[str, Any]) -> str:
    shares = "  ".join(f"{what} {row[what]['share']:.3f} lag {row[what]['lag_ms']}" for what in ("http", "idle"))
    return f"direct {row['direct']['per_s']:.2f}/s  {shares}  cpu {row['http']['cpu_s']}"


@contextlib.contextmanager
def server(options: argparse.Namespace) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The server's address and process, once it is ready."""
    arguments = ["--engine", "torch_threads=1", "--max-batch", str(options.max_batch)]
    command = [sys.executable, str(Path(__file__).parent / "probes" / "serve_probed.py"), *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            ready = next(line for line in process.stderr if "is ready at" in line)
            found = re.search(r"http://\S+", ready)
            assert found is not None
            yield found[0], process
        finally:
            process.terminate()


async def run(options: argparse.Namespace, address: str, process: subprocess.Popen[str]) -> dict[str, Any]:
    load = Load(address, process, options)
    try:
        return await measure(load)
    finally:
        await load.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tries", type=int, default=7, help="first previews and disconnects")
    parser.add_argument("--idle", type=int, default=1000, help="idle connections")
    parser.add_argument("--max-batch", type=int, default=32, help="above 16: a full batch makes the next one wait")
    parser.add_argument("--note", default="", help="goes into the record, such as what else ran on the machine")
    parser.add_argument("--save", action="store_true", help=f"write {RESULTS.name}")
    options = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    load_before = os.getloadavg()
    with server(options) as (address, process):
        result = asyncio.run(run(options, address, process))
    from importlib.metadata import version

    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "load_before": load_before}
    versions = {name: version(name) for name in ("torch", "diffusers", "uvicorn", "starlette", "openai", "uvloop")}
    record = {**result, "options": vars(options) | {"save": None}, "machine": machine, "versions": versions}
    print(json.dumps({name: value for name, value in result.items() if name != "rounds"}, indent=1))
    if options.save:
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
