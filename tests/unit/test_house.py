"""The house rules that no tool checks: sizes, pins, documents that agree with each other."""

from __future__ import annotations

import ast
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

import steploom

ROOT = pathlib.Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
OTHERS = sorted(file for folder in ("tests", "benchmarks", "examples") for file in (ROOT / folder).rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAX_FUNCTION = 40
MAX_FILE = 350


def name_of(source: pathlib.Path) -> str:
    return str(source.relative_to(ROOT)).removeprefix("src/")


def distribution(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9_.-]+", requirement)
    assert match is not None
    return match[0].lower()


@pytest.mark.parametrize("source", [*SOURCES, *OTHERS, ROOT / "noxfile.py"], ids=name_of)
def test_files_stay_small(source: pathlib.Path) -> None:
    assert len(source.read_text().splitlines()) <= MAX_FILE


@pytest.mark.parametrize("source", SOURCES, ids=name_of)
def test_functions_stay_small(source: pathlib.Path) -> None:
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[1] if ast.get_docstring(node) is not None and len(node.body) > 1 else node.body[0]
            assert node.end_lineno is not None
            lines = node.end_lineno - first.lineno + 1
            assert lines <= MAX_FUNCTION, f"{node.name} has {lines} lines"


def test_one_module_alone_is_not_checked_strictly() -> None:
    relaxed = [
        name_of(source) for source in SOURCES if re.search(r"^# pyright: (basic|standard)", source.read_text(), re.M)
    ]
    assert relaxed == ["steploom/weave/untyped.py"]


def test_diffusers_and_transformers_are_imported_in_one_module() -> None:
    importing = set()
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            if {name.partition(".")[0] for name in names} & {"diffusers", "transformers"}:
                importing.add(name_of(source))
    assert importing == {"steploom/weave/untyped.py"}


def test_no_thread_is_taken_from_a_pool_of_the_application() -> None:
    """Whoever fills it may wait for just this. (The command line is its own application.)"""
    taken = set()
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            whole, last = ast.unparse(node.func), node.func.attr
            lent = last == "run_in_executor" and ast.unparse(node.args[0]) == "None"
            lent |= whole.endswith("to_thread.run_sync") and not any(word.arg == "limiter" for word in node.keywords)
            if lent or whole == "asyncio.to_thread" or last in ("run_in_threadpool", "getaddrinfo", "open_file"):
                taken.add(name_of(source))
    assert {name for name in taken if not name.startswith("steploom/cli/")} == set()


def test_every_dependency_is_pinned_and_explained() -> None:
    pinned = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    explained = (ROOT / "docs" / "dependencies.md").read_text()
    groups = [entry for group in PROJECT["dependency-groups"].values() for entry in group if isinstance(entry, str)]
    needed = {distribution(entry) for entry in (*PROJECT["project"]["dependencies"], *groups)}
    assert needed - pinned == set()
    for entry in PROJECT["project"]["dependencies"]:
        assert f"| {distribution(entry)} |" in explained
    for extra in PROJECT["project"]["optional-dependencies"]:
        assert extra == "all" or f"| `{extra}` |" in explained


def test_the_tests_command_of_the_readme_is_the_one_that_ci_runs() -> None:
    setup = "python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt nox && .venv/bin/nox"
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    commands = re.findall(r"^python3 -m venv .*$", readme, re.M)
    assert commands == [f"{setup} -s demo", f"{setup} -s tests"]
    assert f"{setup} -s tests\n" in ci
    assert re.search(r"nox -s .*\bslow\b", ci)


def test_every_public_name_is_there_and_documented() -> None:
    reference = (ROOT / "docs" / "api.md").read_text()
    errors = "automodule:: steploom.errors" in reference
    assert sorted(steploom.__all__) == sorted(["__version__", *steploom._HOME_OF])
    for name in steploom.__all__:
        value = getattr(steploom, name)
        if name == "__version__":
            continue
        assert f"autoclass:: steploom.{name}\n" in reference or (errors and value.__module__ == "steploom.errors")


def test_version_is_the_same_everywhere() -> None:
    assert PROJECT["project"]["version"] == steploom.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in changelog or f"## [{steploom.__version__}]" in changelog


def test_importing_steploom_loads_neither_torch_nor_diffusers() -> None:
    code = "import sys, steploom; print(*{'torch', 'diffusers', 'transformers', 'asyncio', 'zmq'} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert loaded == []


def test_every_document_is_in_the_table_of_contents() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    listed = set(re.findall(r"^([a-z-]+)$", "\n".join(re.findall(r"```\{toctree\}(.*?)```", index, re.S)), re.M))
    assert listed == {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}


def test_no_two_modules_of_tests_have_one_name() -> None:
    """They are imported by their names alone."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name not in ("__init__.py", "conftest.py")]
    assert len(names) == len(set(names)), sorted({name for name in names if names.count(name) > 1})
