"""What compiling brings: the built-in model compiled against as it is, and how long a first and a second start take.

    python benchmarks/compiled.py [--model shallow:qwen_image] [--rounds 5] [--save]

The model is the built-in one, or any that EngineConfig takes; the tests' tiny ones are found, too. One torch thread, in
one process, rounds in turns; figures are medians of seconds per image. The starts are processes of their own, the first
with an empty cache of compiled code and the second with what the first has left there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch

sys.path.append(str(Path(__file__).parent.parent / "tests"))

from steploom import DiffusionRequest, EngineConfig
from steploom.worker.runner import Runner
from steploom.worker.trials.trial import Together

RESULTS = Path(__file__).parent / "results" / "compiled.json"
STEPS = 10
COUNTS = (1, 8)


SIDE = 64


def start(model: str, compiled: bool, say: bool = False) -> Runner:
    config = EngineConfig(model=model, device="cpu", compile=compiled, max_pixels=SIDE * SIDE)
    return Runner.load(config, print if say else None)


def seconds_per_image(runner: Runner, count: int) -> float:
    requests = [
        DiffusionRequest(f"a red circle, {i}", request_id=f"r{i}", seed=i, output_type="latent",
                         num_inference_steps=STEPS, width=SIDE, height=SIDE)
        for i in range(count)
    ]  # fmt: skip
    started = time.perf_counter()
    Together(runner).run(requests)
    return (time.perf_counter() - started) / count


def in_turns(model: str, rounds: int) -> dict[str, Any]:
    runners = {"as it is": start(model, compiled=False), "compiled": start(model, compiled=True)}
    taken: dict[str, dict[int, list[float]]] = {name: {count: [] for count in COUNTS} for name in runners}
    for turn in range(rounds + 1):
        for count in COUNTS:
            for name, runner in runners.items():
                seconds = seconds_per_image(runner, count)
                if turn:  # the first is warm-up
                    taken[name][count].append(seconds)
    medians = {
        f"{count} at a time": {name: round(statistics.median(taken[name][count]), 4) for name in runners}
        for count in COUNTS
    }
    for figures in medians.values():
        figures["gain"] = round(figures["as it is"] / figures["compiled"], 3)
    stats = runners["compiled"].stats()
    return {"seconds_per_image": medians, "compilations": stats.compilations, "uncompiled": stats.uncompiled}


def starts(model: str) -> dict[str, float]:
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "XDG_CACHE_HOME": folder}
        env.pop("TORCHINDUCTOR_CACHE_DIR", None)
        for name in ("first", "second"):
            command = [sys.executable, __file__, "--start", "--model", model]
            said = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
            found[name] = float(said.stdout.split()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--start", action="store_true", help="only start, and say the seconds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.start:
        began = time.perf_counter()
        start(options.model, compiled=True, say=True)
        print(round(time.perf_counter() - began, 2))
        return
    results = {
        "model": options.model,
        "start_s": starts(options.model),
        **in_turns(options.model, options.rounds),
        "steps": STEPS,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, 1 torch thread",
    }
    print(json.dumps(results, indent=1))
    if options.save:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
