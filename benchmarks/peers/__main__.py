"""The same workload on ``pipe(...)``, on steploom and on vLLM-Omni: same checkpoint, same seeds, in turns in one run.

    python benchmarks/peers --checkpoint FOLDER [--vllm-omni /path/to/venv/bin/python] [--requests 32] [--save]

vLLM-Omni is not a dependency: whoever wants to compare installs it into an environment of its own and names its
interpreter. How, and what the figures mean: benchmarks/peers/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a folder: its modules are those of the package peers
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from peers import comparing, workload
from peers.peer import Peer, PeerError

RESULTS = Path(__file__).resolve().parents[1] / "results"
DRIVERS = {"pipe": "peers.drive_pipe", "steploom": "peers.drive_steploom", "vllm-omni": "peers.drive_vllm_omni"}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="folder in diffusers layout")
    parser.add_argument("--vllm-omni", metavar="PYTHON", help="interpreter of the environment that has vLLM-Omni")
    parser.add_argument("--workload", type=Path, help="a workload's file, instead of the following")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sizes", default="512", help="heights and widths that take turns")
    parser.add_argument("--rate", type=float, default=0.0, help="requests a second; 0: all at once")
    parser.add_argument("--arguments", type=json.loads, default={}, help='further ones: {"true_cfg_scale": 4.0}')
    parser.add_argument("--negative-prompt")
    parser.add_argument("--max-batch", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--torch-threads", type=int, help="of pipe(...) and of steploom's worker, on a CPU")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one-at-a-time", action="store_true", help="load each peer for its turn alone: less memory")
    parser.add_argument("--write-workload", type=Path, help="keep the workload for other drivers")
    parser.add_argument("--logs", type=Path, help="folder for what the peers print")
    parser.add_argument("--save", action="store_true", help="write results/peers.json")
    parser.add_argument("--json", type=Path, help="write the figures there")
    return parser.parse_args(argv)


class Contest:
    """Peers, and what each has done."""

    def __init__(self, options: argparse.Namespace, items: list[workload.Item], latents: Path) -> None:
        self._options, self._latents = options, latents
        self._requests = [dataclasses.asdict(item) for item in items]
        self._settings = {
            "dtype": options.dtype, "device": options.device, "max_batch": options.max_batch,
            "torch_threads": options.torch_threads, "compile": options.compile or None,
        }  # fmt: skip
        self.peers: dict[str, dict[str, Any]] = {name: {"rounds": []} for name in DRIVERS}
        if options.vllm_omni is None:
            del self.peers["vllm-omni"]
        self._running: dict[str, Peer] = {}
        self._last: dict[str, list[dict[str, Any]]] = {}

    def run(self) -> None:
        """Warms everybody up, and has them take turns, forwards and backwards."""
        with contextlib.ExitStack() as stack:
            for turn in range(self._options.rounds):
                names = [name for name, one in self.peers.items() if "failed" not in one]
                for name in names if turn % 2 == 0 else reversed(names):
                    self._turn(name, turn, stack)
                    if self._options.one_at_a_time:
                        stack.close()
                        self._running.clear()
                self._compare()
        base = self.peers["pipe"]["rounds"]
        for one in self.peers.values():
            if "failed" not in one:
                one["medians"] = comparing.medians(one["rounds"], base)

    def _turn(self, name: str, turn: int, stack: contextlib.ExitStack) -> None:
        """One peer's turn. One that fails as a whole is out, and the others go on."""
        try:
            if name not in self._running:
                self._running[name] = stack.enter_context(self._peer(name))
                self._running[name].start(self._options.checkpoint, self._settings)
                self.peers[name]["versions"] = self._running[name].versions
                self._running[name].run(self._requests)  # not counted: compiling, learning, verifying
            self._last[name] = self._running[name].run(self._requests, comparing.folder_for(self._latents, name, turn))
        except PeerError as fault:
            self.peers[name]["failed"] = str(fault)
            print(f"  {fault}", flush=True)
            return
        found = comparing.figures(self._last[name])
        self.peers[name]["rounds"].append(found)
        refused = sum(found["refused"].values())
        print(f"  round {turn + 1}: {name}: {found['images_per_s']:.2f} images/s, {refused} refused", flush=True)

    def _peer(self, name: str) -> Peer:
        logs = self._options.logs
        if logs is not None:
            logs.mkdir(parents=True, exist_ok=True)
        interpreter = self._options.vllm_omni if name == "vllm-omni" else None
        return Peer(name, DRIVERS[name], interpreter, log=None if logs is None else logs / f"{name}.log")

    def _compare(self) -> None:
        """The latents of the round: those of every peer with those of ``pipe(...)``."""
        for name, results in self._last.items():
            if name != "pipe" and "pipe" in self._last:
                self.peers[name]["difference"] = comparing.difference(results, self._last["pipe"])


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs it; returns the figures."""
    options = arguments(argv)
    sizes = [int(size) for size in options.sizes.split(",")]
    items = workload.load(options.workload) if options.workload is not None else workload.make(
        options.requests, steps=options.steps, sizes=sizes, rate=options.rate, arguments=options.arguments,
        negative_prompt=options.negative_prompt,
    )  # fmt: skip
    if options.write_workload is not None:
        workload.save(items, options.write_workload)
    with tempfile.TemporaryDirectory() as folder:
        contest = Contest(options, items, Path(folder))
        contest.run()
    asked = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    result = {"options": asked, "requests": len(items), "peers": contest.peers}
    print(comparing.table(contest.peers))
    path = options.json or (RESULTS / "peers.json" if options.save else None)
    if path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
