"""``steploom verify``: does a model of one's own give here what diffusers gives alone, and do requests share?"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from steploom.cli import arguments
from steploom.errors import ConfigError, EngineError

if TYPE_CHECKING:
    from steploom.config import EngineConfig
    from steploom.requests import DiffusionRequest
    from steploom.worker.trials.trial import Verdict

_EXAMPLES = """
examples:
  the built-in model
    steploom verify demo
  a model of your own, small and short
    steploom verify ./my-sd3 --size 256 --steps 4
  what your application will ask for
    steploom verify ./my-flux --dtype bfloat16 --prompt "a lighthouse" --set guidance_scale=3.5

Two requests that differ in prompt, seed, guidance and number of steps run alone with pipe(...), then together. What
the model needs besides (pictures, sizes, lengths) is found by asking it. The exit code is 1 if they do not come out
equal, if that cannot be judged since the model alone does not give the same twice with one seed, or no numbers at all,
or if the model alone cannot do any of what it is asked for.
"""
_FLAGS = {"prompt": "--prompt", "num_inference_steps": "--steps", "width": "--size", "height": "--size"}
"""Arguments of the pipeline that have an option of their own."""

_MEND = (
    "  what to do: with half precision try --dtype float32, which rounds less; if it stays unequal, serve it with "
    "max_batch=1, and report it"
)
_FINITE = (
    "  what to do: give another --dtype: float32, or bfloat16 in place of float16, whose numbers end at 65504; if it "
    "stays, the weights are damaged"
)
_REPEAT = (
    "  what to do: it draws from torch's global generator, not from generator=; give what it draws with --set "
    "(class_labels=1), then ask again"
)
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
                        help="width and height in pixels (default: small, as small as the model takes it)")  # fmt: skip
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
        EngineError: There is no room for it.
        InvalidRequest: The engine would refuse what is asked for.
        GenerationFailed: The pipeline itself fails on these arguments.
    """
    from rich.console import Console

    from steploom.worker.trials import candidates, trial

    if len(options.prompt or ()) > len(PROMPTS):
        raise ConfigError(
            f"--prompt: given {len(options.prompt)} times; there are two requests, so give it once or twice"
        )
    console = Console(highlight=False)
    config = arguments.engine_config(options)
    with Console(stderr=True).status("loading") as status:
        pipeline = _loaded(config, status.update)
        requests = _requests(pipeline, options, config, status.update)
        status.update("two requests, alone and together")
        verdict = trial.trial(pipeline, requests, trial.tolerance_of(pipeline))
    for line in report(type(pipeline).__name__, verdict):
        console.print(line, soft_wrap=True)
    console.print(f"  asked for: {candidates.described(requests[0])}", soft_wrap=True, markup=False)
    return 0 if verdict.equal else 1


def _loaded(config: EngineConfig, tell: Callable[[str], None]) -> Any:
    from steploom.worker.models import loading

    try:
        pipeline = loading.load(config, tell)
    except RuntimeError as fault:  # the device's own, as there is no room for it
        raise EngineError(f"model={config.model!r}: {' '.join(str(fault).split())}") from fault
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _requests(
    pipeline: Any, options: argparse.Namespace, config: EngineConfig, tell: Callable[[str], None]
) -> list[DiffusionRequest]:
    """Two requests that the engine takes and the pipeline can do."""
    from steploom.engine.checks.validation import check_arguments
    from steploom.worker.models import loading
    from steploom.worker.trials import candidates

    prompts = [*(options.prompt or PROMPTS[:1]), *PROMPTS[1:]]
    wishes = candidates.Wishes(options.steps, options.size, prompts, dict(options.extra))
    info = loading.describe(pipeline, in_process=True)
    return candidates.two_requests(pipeline, wishes, lambda request: check_arguments(request, info, config), tell)


def report(name: str, verdict: Verdict) -> list[str]:
    """What to tell about a trial, one finding a line."""
    from rich.markup import escape

    good, bad = "[green]✓[/]", "[bold red]✗[/]"
    if verdict.error is not None:
        return [f"{bad} {name}: a request failed together, though not alone", escape(verdict.error)]
    lines = _equality(verdict, good, bad)
    share = f"{verdict.share:.0%} of the denoiser calls carried both requests"
    batched = f"{'batched' if verdict.batched else 'not batched'}: {share}"
    lines.append(f"{good if verdict.batched else '[yellow]-[/]'} {batched}")
    if not verdict.batched:
        lines += [f"  why not: {escape(reason)} ({count} calls)" for reason, count in verdict.why_not]
    speed = verdict.alone_s / verdict.together_s if verdict.together_s else 0.0
    apart = f"{verdict.alone_s:.2f} s one after the other with pipe(...)"
    lines.append(f"  {apart}, {verdict.together_s:.2f} s together: {speed:.2f}x")
    return lines


def _equality(verdict: Verdict, good: str, bad: str) -> list[str]:
    if verdict.not_finite:
        own = "the model itself computes NaN or infinity, with pipe(...) alone: there is nothing to compare"
        return [f"{bad} {own}", _FINITE]
    if verdict.unrepeatable is not None:
        far = "in kind" if verdict.unrepeatable == float("inf") else f"by {verdict.unrepeatable:.1e} of the scale"
        own = f"the pipeline itself does not repeat with the same seed: pipe(...) alone differs from itself {far}"
        return [f"[yellow]-[/] not comparable: {own}", _REPEAT]
    equal = f"{'equal' if verdict.equal else 'NOT equal'} to pipe(...) alone: {_apart(verdict)}"
    return [f"{good} {equal}"] if verdict.equal else [f"{bad} {equal}", _MEND]


def _apart(verdict: Verdict) -> str:
    worst = max(verdict.distances, default=float("inf"))
    if worst == float("inf"):
        return "another text, shape or kind of output, or no numbers"
    return f"{worst:.1e} of the scale, {verdict.tolerance:.0e} allowed"
