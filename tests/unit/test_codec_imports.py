"""What is written while another thread imports a library: half of a module has none of its types."""

from __future__ import annotations

import importlib.machinery
import sys
import types

import pytest
from PIL import Image

from steploom import DiffusionRequest, codec


@pytest.mark.parametrize("name", ["torch", "numpy"])
def test_a_library_that_another_thread_imports_refuses_no_request(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    half = types.ModuleType(name)
    half.__spec__ = importlib.machinery.ModuleSpec(name, None)
    half.__spec__._initializing = True  # type: ignore[attr-defined]  # as importlib says it
    monkeypatch.setitem(sys.modules, name, half)
    codec.check_request(DiffusionRequest("two boats", image=Image.new("RGB", (8, 8))))
