"""The chores of this project, one session each. ``nox --list`` shows them.

All sessions but ``build`` share one environment, ``.venv`` beside this file: torch and its company take minutes to
install, so they are installed once. What a session needs is installed when ``pyproject.toml`` or ``constraints.txt``
changed since the last time, and not otherwise.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import shutil
import sys
import zipfile

import nox

nox.needs_version = ">=2025.2"
nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "types", "imports", "tests"]

ROOT = pathlib.Path(__file__).parent
ENVIRONMENT = ROOT / ".venv"
SCRIPTS = ENVIRONMENT / "bin"
PINS = ("-c", str(ROOT / "constraints.txt"))
PROJECT = nox.project.load_toml(ROOT / "pyproject.toml")
NO_TESTS = 5
"""pytest's exit status if there was nothing to run."""

LONG_BENCHMARKS = ("latency",)
"""Scripts of ``benchmarks/`` that take hours: they run when they are asked for by name."""

MODEL_LIMIT = 12_000_000
"""Bytes that the built-in model may add to the wheel."""


def prepare(session: nox.Session, *groups: str) -> None:
    """Installs the project (editable) and the dependency groups into the shared environment, if that is due."""
    wanted = nox.project.dependency_groups(PROJECT, *groups)
    recipe = "\n".join([*wanted, *((ROOT / name).read_text() for name in ("pyproject.toml", "constraints.txt"))])
    stamp = ENVIRONMENT / f".prepared-{'-'.join(groups) or 'project'}"
    digest = hashlib.sha256(recipe.encode()).hexdigest()
    if stamp.is_file() and stamp.read_text() == digest:
        return
    if not SCRIPTS.is_dir():
        session.run(sys.executable, "-m", "venv", str(ENVIRONMENT), external=True)
    run(session, "python", "-m", "pip", "install", "-q", *PINS, "-e", str(ROOT), *wanted)
    stamp.write_text(digest)


def run(session: nox.Session, program: str, *args: str) -> None:
    """Runs a program of the shared environment from the project's root."""
    session.chdir(ROOT)
    session.run(str(SCRIPTS / program), *args, external=True)


def pytest(session: nox.Session, which: str) -> None:
    """Runs by themselves the tests that need the machine for that; then the others in two processes of one thread."""
    for marks, processes in ((f"{which} and alone", "0"), (f"{which} and not alone", "2")):
        args = ("-n", processes, "--dist", "worksteal", "--durations", "20", "-m", marks, *session.posargs)
        may_be_none = processes == "0" or session.posargs
        session.chdir(ROOT)
        session.run(
            str(SCRIPTS / "python"), "-m", "pytest", *args,
            external=True, env={"OMP_NUM_THREADS": "1"}, success_codes=[0, NO_TESTS] if may_be_none else [0],
        )  # fmt: skip


@nox.session
def demo(session: nox.Session) -> None:
    """The main job: many prompts at once on the built-in model, beside one-at-a-time."""
    prepare(session)
    run(session, "steploom", "demo", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """The fast path: everything that is not marked slow, in under five minutes on two cores."""
    prepare(session, "test")
    pytest(session, "not slow")


@nox.session
def slow(session: nox.Session) -> None:
    """What needs longer than the fast path allows: conformance, a Ray cluster, accidents, the page in a browser.

    The browser is one that is installed, or Debian's, which root gets.
    """
    prepare(session, "test", "fuzz", "ray")
    _browser(session)
    pytest(session, "slow and not thorough")


@nox.session
def chaos(session: nox.Session) -> None:
    """A storm of accidents for nine minutes: workers die, stand still and mumble, forwards fail, clients leave."""
    prepare(session, "test")
    session.env.setdefault("STORM_SECONDS", "540")
    run(session, "python", "-m", "pytest", "-s", "-m", "slow and not thorough", "tests/chaos", *session.posargs)


@nox.session
def fuzz(session: nox.Session) -> None:
    """The decoder of the wire, fed a million mutations of valid messages: two minutes."""
    prepare(session, "test", "fuzz")
    run(session, "python", "tests/fuzz/decoder.py", *session.posargs)


@nox.session
def search(session: nox.Session) -> None:
    """State machines and properties with ten times the examples, and other ones each time: three minutes."""
    prepare(session, "test")
    run(session, "python", "-m", "pytest", "--hypothesis-profile", "search", "--timeout", "1500", "tests/property",
        "tests/unit/test_codec.py", "tests/unit/test_weave_transcript.py", *session.posargs)  # fmt: skip


@nox.session
def thorough(session: nox.Session) -> None:
    """What takes most of a minute a test: every family compiled, peers in turns, soaks."""
    prepare(session, "test")
    pytest(session, "thorough")


def _browser(session: nox.Session) -> None:
    """Installs Debian's Chromium where no browser is, if that can be done; else tests/browser.py says what to do."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    if os.environ.get("STEPLOOM_BROWSER") or any(map(shutil.which, names)):
        return
    if os.geteuid() == 0 and shutil.which("apt-get"):
        quiet = {"DEBIAN_FRONTEND": "noninteractive"}
        # a list that cannot be renewed (100) may still do
        session.run("apt-get", "update", "-q", external=True, env=quiet, success_codes=[0, 100])
        session.run("apt-get", "install", "-y", "-q", "--no-install-recommends", "chromium", external=True, env=quiet)


@nox.session
def coverage(session: nox.Session) -> None:
    """The fast path under coverage (greenlets and threads included), with a report of what no test reaches."""
    prepare(session, "test")
    run(session, "python", "-m", "coverage", "erase")
    run(session, "python", "-m", "coverage", "run", "-m", "pytest", *session.posargs)
    run(session, "python", "-m", "coverage", "combine")
    run(session, "python", "-m", "coverage", "report")


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff: rules and formatting."""
    prepare(session, "lint")
    run(session, "ruff", "check", ".")
    run(session, "ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Pyright, strict on src."""
    prepare(session, "types")
    run(session, "pyright", *session.posargs)


@nox.session
def imports(session: nox.Session) -> None:
    """import-linter: imports point down only."""
    prepare(session, "imports")
    run(session, "lint-imports")


@nox.session
def docs(session: nox.Session) -> None:
    """Builds the documentation (warnings are errors) and runs the code that stands in it."""
    prepare(session, "docs")
    out = ROOT / "docs" / "_build"
    shutil.rmtree(out, ignore_errors=True)
    for builder in ("html", "doctest"):
        run(session, "sphinx-build", "-W", "--keep-going", "-q", "-b", builder, "docs", str(out / builder))


@nox.session
def bench(session: nox.Session) -> None:
    """The benchmarks of benchmarks/README.md; arguments after ``--`` name some of them."""
    prepare(session)
    scripts = [path for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text()]
    names = session.posargs or sorted(path.stem for path in scripts if path.stem not in LONG_BENCHMARKS)
    for name in names:
        folder = (ROOT / "benchmarks" / name).is_dir()  # benchmarks of several files, when they are asked for: gpu
        run(session, "python", f"benchmarks/{name}" if folder else f"benchmarks/{name}.py")


@nox.session(venv_backend="venv", reuse_venv=False)
def build(session: nox.Session) -> None:
    """Builds sdist and wheel, looks into the wheel, installs it into a new environment and uses it."""
    prepare(session, "build")
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    run(session, "python", "-m", "build", "--outdir", "dist")
    (wheel,) = (ROOT / "dist").glob("*.whl")
    _inspect(session, wheel)
    session.install("-q", *PINS, str(wheel))
    session.chdir(session.create_tmp())
    session.run("steploom", "doctor")
    session.run("steploom", "generate", "a large red circle on a white background", "-o", "out.png", "--steps", "8")
    if not pathlib.Path("out.png").is_file():
        session.error("the installed steploom wrote no image")


def _inspect(session: nox.Session, wheel: pathlib.Path) -> None:
    """Fails the session unless the wheel holds the type marker and the built-in model, within its limit."""
    with zipfile.ZipFile(wheel) as archive:
        sizes = {entry.filename: entry.compress_size for entry in archive.infolist()}
    page = ("steploom/server/page/static/index.html", "steploom/server/page/static/main.js")
    for needed in ("steploom/py.typed", "steploom/demo/model/model_index.json", *page):
        if needed not in sizes:
            session.error(f"{wheel.name} lacks {needed}")
    model = sum(size for name, size in sizes.items() if name.startswith("steploom/demo/model/"))
    session.log(f"{wheel.name}: the built-in model takes {model / 1e6:.1f} MB of {MODEL_LIMIT / 1e6:.0f} MB")
    if model > MODEL_LIMIT:
        session.error(f"the built-in model takes {model} bytes of the wheel; at most {MODEL_LIMIT} are allowed")
