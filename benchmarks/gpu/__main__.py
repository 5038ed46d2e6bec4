"""GPU benchmarks: models of real size with random weights, the engine beside ``pipe(...)`` and the bare forward.

    python benchmarks/gpu --save                       # everything that fits into 8 minutes
    python benchmarks/gpu --only sdxl,flux-dev --sizes 1024 --budget-s 300
    python benchmarks/gpu --tiny --device cpu          # the same code on any machine, in seconds

How to read the figures, and how to run it on a machine without network: benchmarks/gpu/README.md.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import sys
import traceback
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a folder: its modules are those of the package gpu
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import diffusers
import torch
import transformers

from gpu import machine, models
from gpu.architectures import ARCHITECTURES
from gpu.budget import Budget
from gpu.case import Case
from gpu.forwards import ROWS
from gpu.measure import measure, needed_bytes
from gpu.summary import summary

RESULTS = Path(__file__).resolve().parents[1] / "results"


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(ARCHITECTURES), help="models, by name or the beginning of it")
    parser.add_argument("--sizes", default=None, help="heights and widths in pixels (512,1024)")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="rows of the bare forward, requests by them")
    parser.add_argument("--steps", type=int, default=10, help="of each measured request")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each comparison")
    parser.add_argument("--repeats", type=int, default=5, help="requests that join, are cancelled, come and go")
    parser.add_argument("--budget-s", type=float, default=480.0, help="seconds that everything may take")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="bfloat16; float32 on a CPU")
    parser.add_argument("--tiny", action="store_true", help="the same architectures, tiny, at 32 and 64 pixels")
    parser.add_argument("--compile", action="store_true", help="compile the repeated blocks, for both sides")
    parser.add_argument("--attention", help="attention backend as diffusers names them, for both sides")
    parser.add_argument("--cuda-graphs", action="store_true", help="of the engine; pipe(...) has none")
    parser.add_argument("--no-encoders", action="store_true", help="without text encoders: only decoding makes gaps")
    parser.add_argument("--no-mp", action="store_true", help="without the engine in another process")
    parser.add_argument("--save", action="store_true", help=f"write {RESULTS.name}/gpu-<device>.json")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args(argv)
    options.dtype = options.dtype or ("bfloat16" if torch.device(options.device).type == "cuda" else "float32")
    asked = [part.strip() for part in options.only.split(",") if part.strip()]
    options.models = [name for name in ARCHITECTURES if any(name.startswith(part) for part in asked)]
    unknown = [part for part in asked if not any(name.startswith(part) for name in ARCHITECTURES)]
    if unknown:
        parser.error(f"--only {unknown[0]}: one of {', '.join(ARCHITECTURES)}")
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: torch sees no CUDA device; --tiny --device cpu runs anywhere")
    if torch.device(options.device).type == "cpu" and not options.tiny:
        parser.error("--device cpu: models of real size take minutes a step there; add --tiny")
    return options


def run(options: argparse.Namespace, result: dict[str, Any], keep: Any) -> None:
    """Measures every model at every size that fits; ``keep`` is called whenever there is more in ``result``."""
    budget = Budget(options.budget_s)
    result["left_out"] = budget.left_out
    peak = result["peak"] = machine.peak(options.device, options.dtype)
    rows = tuple(int(count) for count in options.rows.split(","))
    sizes = {name: _sizes(options, name) for name in options.models}
    left = sum(map(len, sizes.values()))
    for name in options.models:
        print(f"{name} ({ARCHITECTURES[name].repository})", flush=True)
        pipe, encoders = _built(options, name, budget)
        for size in sizes[name] if pipe is not None else ():
            budget.share(left)
            case = Case(
                name, size, pipe, budget, options.tiny, options.device, options.dtype, options.steps, encoders,
                options.rounds, options.repeats, options.attention, options.compile,
                {"cuda_graphs": True} if options.cuda_graphs else {},
            )  # fmt: skip
            figures = result["models"].setdefault(name, _described(options, name))["sizes"].setdefault(str(size), {})
            _measured(case, rows, figures, peak["flops"], mp=not options.no_mp)
            left -= 1
            result["seconds"] = budget.spent
            keep()
        left -= len(sizes[name]) if pipe is None else 0
        del pipe
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _measured(case: Case, rows: tuple[int, ...], figures: dict[str, Any], peak: float, *, mp: bool) -> None:
    """One case. A fault costs what is left of it, and nothing that was measured."""
    if case.budget.left <= 0:
        case.budget.leave_out(case.label, "everything", "no time left")
        return
    try:
        asyncio.run(measure(case, rows, figures, peak=peak, mp=mp))
    except Exception as fault:  # noqa: BLE001 - recorded; the other cases are measured all the same
        traceback.print_exc()
        case.budget.leave_out(case.label, "the rest", f"{type(fault).__name__}: {fault}"[:500])
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _sizes(options: argparse.Namespace, name: str) -> list[int]:
    if options.sizes is not None:
        return [int(size) for size in options.sizes.split(",")]
    return list(ARCHITECTURES[name].size_tiny if options.tiny else (512, 1024))


def _described(options: argparse.Namespace, name: str) -> dict[str, Any]:
    architecture = ARCHITECTURES[name]
    return {
        "repository": architecture.repository,
        "parameters": models.parameters_of(name, options.tiny),
        "rows_per_request": architecture.rows,
        "calls_per_step": architecture.calls_per_step,
        "frames": architecture.frames,
        "sizes": {},
    }


def _built(options: argparse.Namespace, name: str, budget: Budget) -> tuple[Any, bool]:
    """The pipeline with what both sides shall have, and whether its text encoders found room; None if it did not."""
    free = machine.free_bytes(options.device)
    for encoders in (True, False) if not options.no_encoders else (False,):
        needed = needed_bytes(name, tiny=options.tiny, dtype=options.dtype, encoders=encoders)
        if free is None or needed <= free:
            break
        what = "text encoders" if encoders else "everything"
        budget.leave_out(name, what, f"needs {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")
        if not encoders:
            return None, False
    pipe = models.build(name, tiny=options.tiny, device=options.device, dtype=options.dtype, encoders=encoders)
    denoiser = getattr(pipe, ARCHITECTURES[name].denoiser)
    if options.attention is not None:
        denoiser.set_attention_backend(options.attention)
    if options.compile:
        denoiser.compile_repeated_blocks(dynamic=True)
    return pipe, encoders


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs it. Ctrl-C ends it; the figures so far are kept and reported."""
    options = arguments(argv)
    torch.set_grad_enabled(False)
    diffusers.utils.logging.set_verbosity_error()  # embeddings without masks, prompts cut off: as meant here
    transformers.logging.set_verbosity_error()
    if torch.device(options.device).type == "cpu":
        torch.set_num_threads(1)  # two would measure the neighbours
    short = machine.short_name(options.device)
    path = options.json or (RESULTS / f"gpu{'-tiny' if options.tiny else ''}-{short}.json" if options.save else None)
    asked = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    result: dict[str, Any] = {
        "hardware": machine.hardware(options.device), "versions": machine.versions(), "options": asked, "models": {},
    }  # fmt: skip

    def keep() -> None:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result, indent=1) + "\n")

    try:
        run(options, result, keep)
    except KeyboardInterrupt:
        result["interrupted"] = True
        print("\ninterrupted: the figures so far", flush=True)
    keep()
    print(summary(result))
    if path is not None:
        print(f"written to {path}")
    return result


if __name__ == "__main__":
    main()
