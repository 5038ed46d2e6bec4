"""The tiny pipelines with one block of each kind, which compile in seconds. Factories for a worker, too."""

from __future__ import annotations

from typing import Any

import tiny


def _cut(pipe: Any, *lists: str) -> Any:
    for name in lists:
        blocks = getattr(pipe.transformer, name)
        setattr(pipe.transformer, name, blocks[:1])
    return pipe


def flux() -> Any:
    return _cut(tiny.flux(), "transformer_blocks", "single_transformer_blocks")


def qwen_image() -> Any:
    return _cut(tiny.qwen_image(), "transformer_blocks")


def wan() -> Any:
    return _cut(tiny.wan(), "blocks")


def sd3() -> Any:
    return tiny.sd3()


def sdxl() -> Any:
    return tiny.sdxl()
