"""``steploom doctor``: what is installed here, whether it works, and how to mend what does not."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import pathlib
import platform
import re
import sys
from collections.abc import Callable, Iterator

from steploom import __version__
from steploom.cli import arguments, checks
from steploom.cli.checks import Finding, State

_EXAMPLES = """
examples:
  steploom doctor              look around, then draw one small image with each executor
  steploom doctor --no-run     only look around
  steploom doctor || exit 1    in a container's start script: the exit code is 1 if something is broken

The settings are those of the environment: STEPLOOM_DEVICE=cuda STEPLOOM_MODEL=./my-sd3 and so on.
Signs: ✓ works, - not there, or not tried, and not needed, ✗ broken, with the mend.
Where the output cannot show them: ok, -, wrong.
"""

SIGNS: dict[State, tuple[str, str]] = {"ok": ("✓", "green"), "absent": ("-", "dim"), "broken": ("✗", "bold red")}
"""The sign of each state, and how it looks."""

WORDS: dict[State, str] = {"ok": "ok   ", "absent": "-    ", "broken": "wrong"}
"""The signs where the output's encoding has none for them."""

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

DEMO_PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
"""The folders of the built-in model that hold weights."""

DEEPER = {"diffusers": "DiffusionPipeline", "transformers": "PreTrainedModel"}
"""A name in each module that imports next to nothing before it is asked for one."""

SUBMODULES = {"pillow": "PIL.Image"}
"""Where what others import of a package is not its module, but one inside."""


def add_parser(commands: arguments.Commands) -> None:
    """Adds ``doctor`` to the command."""
    summary = "say what is installed here, whether it works, and how to mend what does not"
    parser = arguments.add_command(commands, "doctor", run, summary=summary, examples=_EXAMPLES)
    parser.add_argument("--no-run", action="store_true", help="do not draw images; only look around")


def run(options: argparse.Namespace) -> int:
    """Runs ``steploom doctor``; 1 if something is broken."""
    say = _printer()
    plain = not _encodable("".join(sign for sign, _ in SIGNS.values()))
    broken = 0
    for finding in _findings(works=not options.no_run):
        broken += finding.state == "broken"
        sign, look = SIGNS[finding.state]
        say(WORDS[finding.state] if plain else sign, look, f" {finding.name:<22} {finding.detail}")
    say("", "", "")
    mark = WORDS["broken"] if plain else SIGNS["broken"][0]
    if broken:
        say(f"{broken} broken", "bold red", f": see the lines with {mark}")
    else:
        say("nothing is wrong", "green", "")
    return 1 if broken else 0


def _printer() -> Callable[[str, str, str], None]:
    """Prints a line: a word, how that looks, and the rest. With rich, or plainly where rich is what is broken."""

    def plainly(word: str, _look: str, rest: str) -> None:
        sys.stdout.write(f"{word}{rest}\n")

    def made() -> Callable[[str, str, str], None]:
        from rich.console import Console
        from rich.text import Text

        console = Console(highlight=False)
        return lambda word, look, rest: console.print(Text.assemble((word, look), rest), soft_wrap=True)

    with_looks, _ = checks.attempt(made)
    return with_looks or plainly


def _encodable(text: str) -> bool:
    """Whether standard output's encoding has these characters."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


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
    yield from extras(tried=whole)


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
    lower = name.lower()
    module = importlib.import_module(SUBMODULES.get(lower, MODULES.get(lower, name)))
    if name in DEEPER:
        getattr(module, DEEPER[name])


def _numbers(version: str) -> tuple[int, ...]:
    release = re.match(r"[0-9.]+", version)
    return tuple(int(part) for part in release[0].split(".") if part) if release else ()


def demo_model() -> Finding:
    """Whether the built-in model is there, with all of its weights."""
    from steploom import demo

    folder = demo.path()
    mend = "pip install --force-reinstall steploom"
    if not (folder / "model_index.json").is_file():
        return Finding("broken", "built-in model", f"{folder} holds no model_index.json; {mend}")
    faults = [fault for part in DEMO_PARTS if (fault := _weights_fault(folder / part)) is not None]
    if faults:
        return Finding("broken", "built-in model", f"{'; '.join(faults)}; {mend}, or in a checkout: git lfs pull")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return Finding("ok", "built-in model", f"{size / 1e6:.1f} MB in {folder}")


def _weights_fault(folder: pathlib.Path) -> str | None:
    """What is wrong with a part's one file of weights, from its header and its size alone."""
    file = next(iter(sorted(folder.glob("*.safetensors"))), None)
    if file is None:
        return f"{folder} holds no .safetensors file"
    with file.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        size = file.stat().st_size
        if len(start) < 8 or length > size - 8:
            return f"{file} is no safetensors file, or cut off ({size} bytes)"
        try:
            header = json.loads(stream.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, LookupError, TypeError, AttributeError):
            return f"{file} is no safetensors file"
    expected = 8 + length + max(ends, default=0)
    return None if size == expected else f"{file} has {size} bytes instead of {expected}"


def _absence(name: str, *, tried: bool) -> str | None:
    """Why a package of an optional part cannot be used: "" if it is not there, else the reason; None if it can be."""
    module = MODULES.get(name, name)
    there, fault = checks.attempt(lambda: _is_there(module))
    if fault is not None:  # what it is a part of does not import
        return fault
    if not there:
        return ""
    return checks.attempt(lambda: importlib.import_module(module))[1] if tried else None


def _is_there(module: str) -> bool:
    """Whether there is such a module; what it is a part of is imported, and raises what it raises."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError as error:  # not even what it is a part of
        if error.name is not None and module.startswith(error.name):
            return False
        raise


def extras(*, tried: bool = True) -> Iterator[Finding]:
    """The optional parts: whether they are there, and import if ``tried`` (what they need themselves does)."""
    for extra, (packages, purpose) in EXTRAS.items():
        name = f"extra {extra}"
        absences = {package: absence for package in packages if (absence := _absence(package, tried=tried)) is not None}
        broken = {package: fault for package, fault in absences.items() if fault}
        if broken:
            said = ", ".join(f"{package} ({fault})" for package, fault in broken.items())
            mend = f"pip install --force-reinstall {' '.join(broken)}"
            yield Finding("broken", name, f"{purpose}; installed but does not import: {said}; {mend}")
        elif absences:
            mend = f"pip install 'steploom[{extra}]' if you need it (lacks {', '.join(absences)})"
            yield Finding("absent", name, f"{purpose}; {mend}")
        else:
            yield Finding("ok", name, f"installed; {purpose}")
