"""The programs in the documents, as a reader would copy them: each in a process and a folder of its own."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
FENCE = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)


def programs() -> list[pytest.param]:
    found = []
    names = ("index", "tutorial", "embedding", "observability", "step-caching", "executors", "migration", "operations")
    pages = [f"docs/{name}.md" for name in names]
    for document in ("README.md", *pages):
        for place, program in enumerate(FENCE.findall((ROOT / document).read_text()), start=1):
            marks = [pytest.mark.timeout(300), pytest.mark.slow]
            found.append(pytest.param(program, marks=marks, id=f"{document}-{place}"))
    return found


def test_the_documents_hold_programs() -> None:
    assert len(programs()) >= 8


@pytest.mark.parametrize("program", programs())
def test_a_program_of_the_documents_runs(program: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "program.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    saved = set(re.findall(r'save\(f?"([^{}"]+)"\)', program))
    assert saved <= {path.name for path in tmp_path.iterdir()}
