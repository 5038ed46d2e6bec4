"""Compiling a pipeline's denoisers with ``torch.compile``, and refusing where that cannot be."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from steploom.config import EngineConfig
from steploom.errors import ConfigError
from steploom.weave import signatures, untyped

_GRAPHS_INSIDE = ("reduce-overhead", "max-autotune")
"""Modes in which torch replays CUDA graphs of its own, whose results the next forward overwrites."""


def arguments(config: EngineConfig) -> dict[str, Any]:
    """What ``torch.compile`` is given. Rows and sizes are dynamic, so that few kinds of inputs are compiled."""
    given = dict(config.compile) if isinstance(config.compile, Mapping) else {}
    given.pop("regional", None)
    chosen: dict[str, Any] = {"dynamic": True, **given}
    if "recompile_limit" in signatures.parameters_of(torch.compile):  # torch counts by function, and stops at 8
        chosen["recompile_limit"] = config.max_compilations
    return chosen


def refuse(config: EngineConfig, device: torch.device) -> None:
    """Refuses what cannot be compiled here.

    Raises:
        ConfigError: There is no such backend or mode, or no compiler for it.
    """
    if not config.compile:
        return
    given = arguments(config)
    backend, mode = given.get("backend", "inductor"), given.get("mode")
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise ConfigError(
            f"compile={config.compile!r}: torch has no backend {backend!r}; give one of {', '.join(known)}"
        )
    if backend != "inductor":
        return
    if mode is not None:
        _refuse_mode(config, mode)
    options: Mapping[str, Any] = given.get("options") or {}
    if options.get("triton.cudagraphs") or (mode in _GRAPHS_INSIDE and device.type == "cuda"):
        raise ConfigError(
            f"compile={config.compile!r}: replays CUDA graphs whose results the next forward overwrites; give "
            "cuda_graphs=True, with mode='max-autotune-no-cudagraphs' if you want it tuned"
        )
    lacking = _lacking(device)
    if lacking is not None:
        raise ConfigError(
            f"compile={config.compile!r}: {lacking}, or leave compile False, or try what needs none, "
            "compile={'backend': 'aot_eager'}"
        )


def _refuse_mode(config: EngineConfig, mode: str) -> None:
    modes = ["default", *importlib.import_module("torch._inductor").list_mode_options()]
    if mode not in modes:
        raise ConfigError(f"compile={config.compile!r}: torch has no mode {mode!r}; give one of {', '.join(modes)}")


def _lacking(device: torch.device) -> str | None:
    """What inductor needs on this device and is not here, as a mend; None if all is there."""
    if device.type == "cuda":
        there = importlib.import_module("torch.utils._triton").has_triton()
        return None if there else "torch.compile needs Triton on CUDA, and it does not work here; pip install triton"
    try:
        importlib.import_module("torch._inductor.cpp_builder").get_cpp_compiler()
    except Exception as error:  # noqa: BLE001 - each platform's search raises its own; told as it is
        words = " ".join(str(error).split())[:200] or type(error).__name__
        return f"torch.compile needs a C++ compiler on {device.type}, and finds none ({words}); install g++, or set CXX"
    return None


def apply(modules: Mapping[str, Any], config: EngineConfig, progress: Callable[[str], None]) -> None:
    """Marks denoisers to be compiled at their first calls: their repeated blocks, or those that name none as a whole.

    Args:
        modules: By component's name.
        config: The engine's settings.
        progress: Is told what is compiled.

    Raises:
        ConfigError: torch does not take these arguments together.
    """
    given = arguments(config)
    regional = not isinstance(config.compile, Mapping) or config.compile.get("regional", True)
    for name, module in modules.items():
        blocks = untyped.repeated_blocks(module) if regional else []
        kind = type(module).__name__
        progress(f"{name}: compiling {' and '.join(blocks) if blocks else f'{kind} as a whole'} at the first calls")
        try:
            if blocks:
                module.compile_repeated_blocks(**given)
            else:
                module.compile(**given)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ConfigError(f"compile={config.compile!r}: {' '.join(str(error).split())}") from None
