"""``steploom doctor``: what is installed here, whether it works, and how to mend what does not."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import platform
import re
import sys
from collections.abc import Iterator
from typing import Any, Literal

from steploom import __version__
from steploom.cli import arguments
from steploom.config import EngineConfig
from steploom.errors import SteploomError

_EXAMPLES = """
examples:
  steploom doctor              look around, then draw one small image with each executor
  steploom doctor --no-run     only look around
  steploom doctor || exit 1    in a container's start script: the exit code is 1 if something essential is broken

Signs: ✓ works, - optional and not there, ✗ broken, with the mend.
"""

State = Literal["ok", "absent", "broken"]
SIGNS: dict[State, str] = {"ok": "[green]✓[/]", "absent": "[dim]-[/]", "broken": "[bold red]✗[/]"}
EXTRAS = {
    "server": ("starlette", "uvicorn"),
    "video": ("imageio",),
    "ray": ("ray",),
    "otel": ("opentelemetry",),
}
"""Which modules each optional part needs."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report: what was looked at, how it is, and what to know or do about it."""

    state: State
    name: str
    detail: str


def add_parser(commands: arguments.Commands) -> None:
    """Adds ``doctor`` to the command."""
    summary = "say what is installed here, whether it works, and how to mend what does not"
    parser = arguments.add_command(commands, "doctor", run, summary=summary, examples=_EXAMPLES)
    parser.add_argument("--no-run", action="store_true", help="do not draw images; only look around")


def run(options: argparse.Namespace) -> int:
    """Runs ``steploom doctor``; 1 if something is broken."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    broken = 0
    for finding in _findings(works=not options.no_run):
        broken += finding.state == "broken"
        console.print(f"{SIGNS[finding.state]} {finding.name:<22} {escape(finding.detail)}", soft_wrap=True)
    console.print()
    console.print("[green]nothing is wrong[/]" if not broken else f"[bold red]{broken} broken[/]: see the lines with ✗")
    return 1 if broken else 0


def _findings(*, works: bool) -> Iterator[Finding]:
    yield Finding("ok", "steploom", __version__)
    yield Finding("ok", "python", f"{platform.python_version()} on {platform.platform(terse=True)}, {sys.executable}")
    packages = list(packages_found())
    yield from packages
    yield from _settings()
    yield _demo_model()
    if any(finding.state == "broken" for finding in packages):
        return
    yield from _devices()
    yield from _executors(works=works)
    yield from _extras()


def packages_found(distribution: str = "steploom") -> Iterator[Finding]:
    """A finding for each package that ``distribution`` needs, from its own metadata."""
    for requirement in importlib.metadata.requires(distribution) or ():
        needed, _, marker = requirement.partition(";")
        if "extra" in marker or ("win32" in marker and sys.platform == "win32"):
            continue
        match = re.match(r"([A-Za-z0-9_.-]+)(.*)", needed.strip())
        assert match is not None
        yield _package(match[1], match[2].strip())


def _package(name: str, wanted: str) -> Finding:
    """Whether a package is installed and at least as new as ``wanted`` (``>=1.2``) says."""
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding("broken", name, f"not installed; pip install '{name}{wanted}'")
    least = re.search(r">=\s*([0-9.]+)", wanted)
    if least and _numbers(found) < _numbers(least[1]):
        return Finding("broken", name, f"{found} is too old; pip install '{name}{wanted}'")
    return Finding("ok", name, found)


def _numbers(version: str) -> tuple[int, ...]:
    release = re.match(r"[0-9.]+", version)
    return tuple(int(part) for part in release[0].split(".") if part) if release else ()


def _settings() -> Iterator[Finding]:
    try:
        EngineConfig.from_env()
    except SteploomError as error:
        yield Finding("broken", "settings", f"{error}; correct or unset that variable")


def _demo_model() -> Finding:
    from steploom import demo

    folder = demo.path()
    if not (folder / "model_index.json").is_file():
        return Finding("broken", "built-in model", f"{folder} holds no model_index.json; reinstall steploom")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return Finding("ok", "built-in model", f"{size / 1e6:.1f} MB in {folder}")


def _devices() -> Iterator[Finding]:
    """What torch can compute on."""
    import torch

    yield Finding("ok", "cpu", f"{torch.get_num_threads()} threads, {platform.machine()}")
    cuda: Any = torch.cuda
    if cuda.is_available():
        for index in range(cuda.device_count()):
            about: Any = cuda.get_device_properties(index)
            memory = f"{about.total_memory / 2**30:.0f} GiB, compute capability {about.major}.{about.minor}"
            yield Finding("ok", f"cuda:{index}", f"{about.name}, {memory}")
    elif torch.version.cuda is not None:
        yield Finding(
            "absent", "cuda", f"torch is built for CUDA {torch.version.cuda} but finds no usable GPU or driver"
        )
    else:
        yield Finding("absent", "cuda", "this build of torch is for the CPU")
    if torch.backends.mps.is_available():
        yield Finding("ok", "mps", "Apple GPU")


def _executors(*, works: bool) -> Iterator[Finding]:
    """Whether an image comes out of each executor."""
    for backend, meaning in (("mp", "a worker process"), ("inproc", "a thread")):
        if backend == "mp" and sys.platform == "win32":
            yield Finding("absent", "executor mp", "not offered on Windows")
        elif not works:
            yield Finding("ok", f"executor {backend}", f"{meaning}; not tried")
        else:
            yield _try_executor(backend, meaning)
    ray = importlib.util.find_spec("ray") is not None
    yield Finding("ok" if ray else "absent", "executor ray", "installed" if ray else "pip install 'steploom[ray]'")


def _try_executor(backend: str, meaning: str) -> Finding:
    from steploom.cli import loop

    try:
        seconds = loop.run(_draw(backend))
    except (SteploomError, OSError) as error:
        return Finding("broken", f"executor {backend}", f"{meaning}: {' '.join(str(error).split())}")
    return Finding("ok", f"executor {backend}", f"{meaning}; drew an image, {seconds:.1f} s from start to end")


async def _draw(backend: str) -> float:
    """Draws one image with a new engine; returns the seconds that it took from start to end."""
    import time

    from steploom import AsyncDiffusionEngine

    start = time.perf_counter()
    config = EngineConfig(distributed_executor_backend=backend, device="auto")
    async with AsyncDiffusionEngine(config) as engine:
        await engine.generate("a red circle on a white background", seed=1, num_inference_steps=2)
    return time.perf_counter() - start


def _extras() -> Iterator[Finding]:
    for extra, modules in EXTRAS.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        if missing:
            yield Finding("absent", f"extra {extra}", f"pip install 'steploom[{extra}]' (lacks {', '.join(missing)})")
        else:
            yield Finding("ok", f"extra {extra}", "installed")
