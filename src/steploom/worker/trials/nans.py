"""Whether a pipeline's modules compute NaN: tokens that are picked from such logits look like any others."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from steploom.weave import untyped
from steploom.weave.calls import Leaf, flatten


@contextmanager
def listened_for_nan(pipeline: Any) -> Generator[set[str]]:
    """While it is open: the names of the pipeline's modules that have computed NaN."""
    heard: set[str] = set()
    with ExitStack() as hooks:
        for name, module in untyped.modules_of(pipeline).items():

            def listen(module: Any, args: Any, output: Any, name: str = name) -> None:
                if _has_nan(output):
                    heard.add(name)

            hooks.enter_context(_removed(module.register_forward_hook(listen)))
        yield heard


@contextmanager
def _removed(hook: Any) -> Generator[None]:
    try:
        yield
    finally:
        hook.remove()


def _has_nan(output: Any) -> bool:
    leaves: list[Leaf] = []
    flatten(output, leaves)
    tensors = (one for leaf in leaves for one in (leaf if isinstance(leaf, list) else [leaf]))
    return any(one.is_floating_point() and bool(torch.isnan(one).any()) for one in tensors)
