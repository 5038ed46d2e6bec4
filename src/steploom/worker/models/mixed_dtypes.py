"""Dtypes by component: those that a pipeline cannot decode with, which it would find out after its last step."""

from __future__ import annotations

import ast
from typing import Any

import torch

from steploom.errors import ConfigError
from steploom.weave import source_code
from steploom.weave.order import is_denoiser
from steploom.weave.source_code import Function

_DECODER, _ITS_DTYPE, _MOVES = "vae", "self.vae.dtype", "self.vae.to"

_BRINGING = ("StableDiffusionUpscalePipeline",)
"""Pipelines that bring latents to the dtype of the VAE's weights, as others do to a VAE in float16 alone."""


def refuse(cls: Any, given: Any, dtypes: dict[str, torch.dtype]) -> None:
    """Refuses a VAE of another dtype than the denoisers', where the pipeline hands it their latents as they are.

    Args:
        cls: The pipeline's class; None where it is not known.
        given: The setting, for the message.
        dtypes: By component.

    Raises:
        ConfigError: Names both dtypes.
    """
    own = dtypes.get(_DECODER)
    other = next((dtype for name, dtype in dtypes.items() if is_denoiser(name) and dtype != own), None)
    if cls is None or own is None or other is None or not _hands_on(cls, own):
        return
    named, wanted = (str(dtype).removeprefix("torch.") for dtype in (own, other))
    raise ConfigError(
        f"dtype={given!r}: {cls.__name__} hands the denoiser's latents, in {wanted}, to the VAE as they are, which in "
        f"{named} would fail at them after the last step; give both one dtype, such as {wanted!r}"
    )


def _hands_on(cls: Any, own: torch.dtype) -> bool:
    """Whether it can be seen that a pipeline decodes latents and brings neither them nor its VAE to another dtype."""
    call, *others = (source_code.function(cls, name) for name in ("__call__", "prepare_latents", "_encode_vae_image"))
    if call is None or "self.vae.decode" not in _called(call) or cls.__name__ in _BRINGING:
        return False
    if own == torch.float16 and "force_upcast" in ast.unparse(call):
        return False
    others = [body for body in others if body is not None]
    anyhow = [line for line in call.body if isinstance(line, (ast.Expr, ast.Assign))]
    moving = [call] if torch.backends.mps.is_available() else [*anyhow, *others]
    return not any(map(_heeds, [call, *others])) and not any(_MOVES in _called(part) for part in moving)


def _called(part: ast.AST) -> list[str]:
    """What is called in a part of a function."""
    return [ast.unparse(node.func) for node in ast.walk(part) if isinstance(node, ast.Call)]


def _heeds(body: Function) -> bool:
    """Whether the VAE's dtype is used for more than to be compared."""
    compared = {id(inner) for node in ast.walk(body) if isinstance(node, ast.Compare) for inner in ast.walk(node)}
    return any(
        isinstance(node, ast.Attribute) and id(node) not in compared and ast.unparse(node) == _ITS_DTYPE
        for node in ast.walk(body)
    )
