"""What one preview costs, beside one step of the denoiser.

    python benchmarks/previews.py [--repeats 100] [--save]

One torch thread. A request is stopped after its first step; then its preview is made again and again, in each way that
there is, in turns with steps of the same pipeline without previews. A preview includes the rest of the pipeline's own
code up to its decoder, and the copy to the host. Figures are medians in milliseconds. ``tiny autoencoder`` is an
``AutoencoderTiny`` of TAESD's size with random weights: it costs what a trained one costs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch

from steploom import EngineConfig, demo
from steploom.protocol import NewRequest, SchedulerOutput
from steploom.requests import DiffusionRequest
from steploom.weave.previews import preview
from steploom.worker.runner import Runner

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "previews.json"
STEPS = 1000


def demo_model() -> Any:
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(demo.path())


def built_by_tests(family: str) -> Callable[[], Any]:
    """A family's own VAE and transformer with tiny random weights, as the tests build them."""

    def build() -> Any:
        sys.path.append(str(HERE.parent / "tests"))
        import tiny

        return getattr(tiny, family)()

    return build


MODELS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "built-in model, 64x64": (demo_model, {"max_sequence_length": 16}),
    "built-in model, 96x96": (demo_model, {"max_sequence_length": 16, "height": 96, "width": 96}),
    "tiny Flux, packed latents of 32x32": (
        built_by_tests("flux"), {"max_sequence_length": 16, "height": 64, "width": 64},
    ),
    "tiny Wan, 5 frames of 64x64": (
        built_by_tests("wan"), {"max_sequence_length": 16, "height": 64, "width": 64, "num_frames": 5},
    ),
}  # fmt: skip


def previewers(pipe: Any) -> dict[str, Any]:
    """One for each way, whatever the size of the model's own VAE."""
    from diffusers import AutoencoderTiny

    own = preview.Previewer(pipe)
    own._maps.clear()
    settings = pipe.vae.config
    channels = settings.get("latent_channels") or settings["z_dim"]
    tiny = preview.Previewer(pipe, AutoencoderTiny(latent_channels=channels).eval())
    return {"linear map": linear(pipe), "tiny autoencoder": tiny, "the model's own VAE": own}


def linear(pipe: Any) -> Any:
    """One that shows by a linear map even where the model's own VAE is as small as a tiny autoencoder."""
    limit, preview.TINY_PARAMETERS = preview.TINY_PARAMETERS, 0
    try:
        return preview.Previewer(pipe)
    finally:
        preview.TINY_PARAMETERS = limit


def milliseconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - started)


def measure(build: Callable[[], Any], arguments: dict[str, Any], repeats: int) -> dict[str, float]:
    pipe = build()
    pipe.set_progress_bar_config(disable=True)
    runner = Runner(pipe, EngineConfig(max_steps=STEPS), in_process=True)
    request = DiffusionRequest("a red circle", seed=1, num_inference_steps=STEPS, output_type="latent", **arguments)
    ticks = iter(range(1, 10**6))
    runner.execute(SchedulerOutput(tick=next(ticks), scheduled_new_reqs=[NewRequest("r", request)]))
    program = runner._residents["r"].program
    ways = previewers(pipe)
    for way in ways.values():
        way.picture(program)  # not counted: the first compiles the rest of the pipeline's code
    times: dict[str, list[float]] = {name: [] for name in (*ways, "one step without a preview")}
    times["fitting the linear map, once, at load"] = [milliseconds(lambda: linear(pipe)) for _ in range(3)]
    for _ in range(repeats):
        for name, way in ways.items():
            times[name].append(milliseconds(lambda way=way: preview.on_host(way.picture(program))))
        step = SchedulerOutput(tick=next(ticks), scheduled_cached_reqs=["r"])
        times["one step without a preview"].append(milliseconds(lambda step=step: runner.execute(step)))
    runner.close()
    return {name: round(statistics.median(values), 2) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--note", default="", help="goes into the record, such as what else ran on the machine")
    parser.add_argument("--save", action="store_true", help=f"write {RESULTS.name}")
    options = parser.parse_args()
    import diffusers

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    found: dict[str, dict[str, float]] = {}
    for name, (build, arguments) in MODELS.items():
        found[name] = measure(build, arguments, options.repeats)
        print(f"{name}:")
        for way, value in found[name].items():
            print(f"  {value:8.2f} ms  {way}", flush=True)
    if options.save:
        machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "python": platform.python_version()}
        record = {"median_ms": found, "repeats": options.repeats, "note": options.note, "machine": machine, **versions}
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
