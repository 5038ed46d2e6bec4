"""Importing steploom is quick and loads nothing heavy."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "diffusers", "transformers", "numpy", "zmq", "greenlet", "anyio")
LIMIT_S = 0.15
TRIES = 5
SCRIPT = """
import json, sys, time
start = time.process_time()
{statement}
took = time.process_time() - start
print(json.dumps([took, sorted(sys.modules)]))
"""


def imported(statement: str) -> tuple[float, set[str]]:
    """Seconds of a processor that the statement took in a new interpreter, and the modules that were loaded then."""
    command = [sys.executable, "-c", SCRIPT.format(statement=statement)]
    took, modules = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)
    return took, set(modules)


def test_import_is_quick_and_loads_nothing_heavy() -> None:
    took, modules = min((imported("import steploom") for _ in range(TRIES)), key=lambda one: one[0])
    assert not modules.intersection(HEAVY)
    assert took < LIMIT_S


@pytest.mark.parametrize("name", ["AsyncDiffusionEngine", "DiffusionEngine", "EngineConfig", "DiffusionRequest"])
def test_the_engine_itself_loads_no_torch(name: str) -> None:
    _, modules = imported(f"import steploom; steploom.{name}")
    assert not modules.intersection({"torch", "diffusers", "transformers", "greenlet"})
