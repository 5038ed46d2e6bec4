"""``steploom doctor``: what is installed here, whether it works, and how to mend what does not."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import platform
import re
import sys
from collections.abc import Iterator

from steploom import __version__
from steploom.cli import arguments, checks
from steploom.cli.checks import Finding, State

_EXAMPLES = """
examples:
  steploom doctor              look around, then draw one small image with each executor
  steploom doctor --no-run     only look around
  steploom doctor || exit 1    in a container's start script: the exit code is 1 if something essential is broken

The settings are those of the environment: STEPLOOM_DEVICE=cuda STEPLOOM_MODEL=./my-sd3 and so on.
Signs: ✓ works, - not there, or not tried, and not needed, ✗ broken, with the mend.
"""

SIGNS: dict[State, str] = {"ok": "[green]✓[/]", "absent": "[dim]-[/]", "broken": "[bold red]✗[/]"}
EXTRAS = {
    "lora": (("peft",), "requests may have LoRA adapters of their own"),
    "video": (("av",), "videos as .mp4 and .webm, compressed sound"),
    "server": (("starlette", "uvicorn", "python-multipart", "prometheus-client"), "`steploom serve`"),
    "otel": (("opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-http"), "traces of requests"),
    "quantization": (("torchao", "gguf"), "quantized weights, as diffusers loads them"),
    "ray": (("ray",), "workers on the nodes of a Ray cluster, Ray Serve"),
}
"""Which modules each optional part of this version needs, and what for."""

MODULES = {"pyzmq": "zmq", "pillow": "PIL", "python-multipart": "python_multipart",
           "prometheus-client": "prometheus_client", "opentelemetry-sdk": "opentelemetry.sdk",
           "opentelemetry-exporter-otlp-proto-http": "opentelemetry.exporter.otlp.proto.http"}  # fmt: skip
"""The module of each package that has another name than its module."""

DEEPER = {"diffusers": "DiffusionPipeline", "transformers": "PreTrainedModel"}
"""A name in each module that imports next to nothing before it is asked for one."""


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
    packages: list[Finding] = []
    for finding in packages_found():
        packages.append(finding)
        yield finding
    yield demo_model()
    config = checks.read_settings()
    if isinstance(config, Finding):
        yield config
    whole = all(finding.state != "broken" for finding in packages)
    if whole:
        yield from checks.devices()
    if whole and not isinstance(config, Finding):
        settings = list(checks.settings(config))
        yield from settings
        not_tried = None if works else "not tried"
        if any(finding.state == "broken" for finding in settings):
            not_tried = "not tried, since a setting is wrong"
        yield from checks.executors(config, not_tried)
    yield from extras()


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
    """Whether a package is installed, at least as new as ``wanted`` (``>=1.2``) says, and imports."""
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding("broken", name, f"not installed; pip install '{name}{wanted}'")
    least = re.search(r">=\s*([0-9.]+)", wanted)
    if least and _numbers(found) < _numbers(least[1]):
        return Finding("broken", name, f"{found} is too old; pip install '{name}{wanted}'")
    _, fault = checks.attempt(lambda: _import(name))
    if fault is not None:
        mend = f"pip install --force-reinstall '{name}{wanted}'"
        return Finding("broken", name, f"{found} is installed but does not import ({fault}); {mend}")
    return Finding("ok", name, found)


def _import(name: str) -> None:
    module = importlib.import_module(MODULES.get(name.lower(), name))
    if name in DEEPER:
        getattr(module, DEEPER[name])


def _numbers(version: str) -> tuple[int, ...]:
    release = re.match(r"[0-9.]+", version)
    return tuple(int(part) for part in release[0].split(".") if part) if release else ()


def demo_model() -> Finding:
    """Whether the built-in model is there."""
    from steploom import demo

    folder = demo.path()
    if not (folder / "model_index.json").is_file():
        return Finding("broken", "built-in model", f"{folder} holds no model_index.json; reinstall steploom")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return Finding("ok", "built-in model", f"{size / 1e6:.1f} MB in {folder}")


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even what it is a part of
        return False


def extras() -> Iterator[Finding]:
    """The optional parts: whether they are there."""
    for extra, (modules, purpose) in EXTRAS.items():
        missing = [module for module in modules if not _is_there(MODULES.get(module, module))]
        if missing:
            mend = f"pip install 'steploom[{extra}]' if you need it (lacks {', '.join(missing)})"
            yield Finding("absent", f"extra {extra}", f"{purpose}; {mend}")
        else:
            yield Finding("ok", f"extra {extra}", f"installed; {purpose}")
