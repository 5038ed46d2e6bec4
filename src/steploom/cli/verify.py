"""``steploom verify``: does a model of one's own give here what diffusers gives alone, and do requests share?"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from steploom.cli import arguments
from steploom.errors import GenerationFailed

if TYPE_CHECKING:
    from steploom.requests import DiffusionRequest
    from steploom.worker.trial import Verdict

_EXAMPLES = """
examples:
  the built-in model
    steploom verify demo
  a model of your own, small and short
    steploom verify ./my-sd3 --size 256 --steps 4
  what your application will ask for
    steploom verify ./my-flux --dtype bfloat16 --prompt "a lighthouse" --set guidance_scale=3.5

Two requests that differ in prompt, seed, guidance and number of steps run alone with pipe(...), then together.
The exit code is 1 if they do not come out equal.
"""
_FLAGS = {"prompt": "--prompt", "num_inference_steps": "--steps", "width": "--size", "height": "--size"}
"""Arguments of the pipeline that have an option of their own."""

SMALL = 256
PROMPTS = ("a lighthouse at dusk", "two green boats on a lake")


def add_parser(commands: arguments.Commands) -> None:
    """Adds ``verify`` to the command."""
    summary = "check that a model gives here what diffusers gives alone, and that requests share"
    parser = arguments.add_command(commands, "verify", run, summary=summary, examples=_EXAMPLES)
    parser.add_argument(
        "model", type=arguments.model, metavar="MODEL", help="a folder, a hub id, a file, pkg.module:factory, or demo"
    )
    parser.add_argument("--steps", type=arguments.count, default=3, metavar="N",
                        help="steps of the first request; the second has one more (default: %(default)s)")  # fmt: skip
    parser.add_argument("--size", type=arguments.count, metavar="PX",
                        help=f"width and height in pixels (default: the model's, at most {SMALL})")  # fmt: skip
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="twice for two prompts (default: of our own)")
    parser.add_argument("--set", type=arguments.settings_beside(**_FLAGS), action="append", default=[],
                        metavar="KEY=VALUE", dest="extra",
                        help="any further argument of the pipeline; may be repeated")  # fmt: skip
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), help="of the weights")
    arguments.add_loading_options(parser)
    parser.set_defaults(backend=None)


def run(options: argparse.Namespace) -> int:
    """Runs ``steploom verify``; 1 if outputs are not equal.

    Raises:
        ConfigError: The model cannot be loaded or woven.
        GenerationFailed: The pipeline itself fails on these arguments.
    """
    from rich.console import Console

    from steploom.worker import loading, trial

    console = Console(highlight=False)
    config = arguments.engine_config(options)
    with Console(stderr=True).status("loading") as status:
        pipeline = loading.load(config, status.update)
        pipeline.set_progress_bar_config(disable=True)
        requests = _requests(options, pipeline)
        status.update("two requests, alone and together")
        try:
            verdict = trial.trial(pipeline, requests, trial.tolerance_of(pipeline))
        except (ValueError, TypeError, RuntimeError) as error:
            raise GenerationFailed(f"{type(pipeline).__name__} alone, without steploom: {error}") from error
    for line in report(type(pipeline).__name__, verdict):
        console.print(line, soft_wrap=True)
    return 0 if verdict.equal else 1


def _requests(options: argparse.Namespace, pipeline: Any) -> list[DiffusionRequest]:
    """Two requests that differ in whatever the pipeline lets a user vary."""
    from steploom.requests import DiffusionRequest
    from steploom.weave import untyped
    from steploom.worker import loading

    accepted = untyped.call_parameters(pipeline)
    size = options.size or min(SMALL, (loading.describe(pipeline, in_process=True).default_size or (SMALL, SMALL))[0])
    prompts = [*(options.prompt or PROMPTS[:1]), *PROMPTS[1:]]
    guidance = getattr(accepted.get("guidance_scale"), "default", None)
    requests: list[DiffusionRequest] = []
    for i in range(2):
        values: dict[str, Any] = {"num_inference_steps": options.steps + i, "width": size, "height": size}
        if isinstance(guidance, (int, float)):
            values["guidance_scale"] = guidance + 0.5 * i
        if "image" in accepted and accepted["image"].default is accepted["image"].empty:
            values["image"] = _picture(size, i)
        values = {name: value for name, value in values.items() if name in accepted} | dict(options.extra)
        prompt = prompts[i] if "prompt" in accepted else None
        kind = "latent" if "output_type" in accepted else "pil"
        requests.append(DiffusionRequest(prompt, request_id=f"r{i}", seed=i, output_type=kind, **values))
    return requests


def _picture(size: int, seed: int) -> Any:
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)


def report(name: str, verdict: Verdict) -> list[str]:
    """What to tell about a trial, one finding a line."""
    good, bad = "[green]✓[/]", "[bold red]✗[/]"
    if verdict.error is not None:
        return [f"{bad} {name}: a request failed together, though not alone", verdict.error]
    worst = max(verdict.distances)
    allowed = f"{worst:.1e} of the scale, {verdict.tolerance:.0e} allowed"
    lines = [
        f"{good if verdict.equal else bad} {'equal' if verdict.equal else 'NOT equal'} to pipe(...) alone: {allowed}"
    ]
    share = f"{verdict.share:.0%} of the denoiser calls carried both requests"
    lines.append(
        f"{good if verdict.batched else '[yellow]-[/]'} {'batched' if verdict.batched else 'not batched'}: {share}"
    )
    lines += [
        f"  why not: {reason} ({count} calls)" for reason, count in verdict.reasons.items() if reason != "only one"
    ]
    speed = verdict.alone_s / verdict.together_s if verdict.together_s else 0.0
    apart = f"{verdict.alone_s:.2f} s one after the other with pipe(...)"
    lines.append(f"  {apart}, {verdict.together_s:.2f} s together: {speed:.2f}x")
    return lines
