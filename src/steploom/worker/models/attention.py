"""Attention backends, as diffusers names them."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch

from steploom.errors import ConfigError
from steploom.weave import untyped

log = logging.getLogger(__name__)


def refuse(backend: str | None) -> None:
    """Refuses a backend that diffusers does not know.

    Raises:
        ConfigError: It names the nearest.
    """
    if backend is None:
        return
    known = [one.value for one in untyped.attention_backends().AttentionBackendName]
    if backend.lower() in known:
        return
    nearest = difflib.get_close_matches(backend.lower(), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, nearest))}?" if nearest else f"it has {', '.join(known)}"
    raise ConfigError(f"attention_backend={backend!r}: diffusers has no such backend; {hint}")


def choose(
    modules: Mapping[str, Any], backend: str, device: torch.device, name: str, progress: Callable[[str], None]
) -> None:
    """Sets the backend of all denoisers that have a choice.

    Args:
        modules: The denoisers, by component.
        backend: As diffusers names it.
        device: Where they will compute.
        name: Of the pipeline's class.
        progress: Is told where it is without effect.

    Raises:
        ConfigError: There is no such backend, its package is not there, it does not compute on this device, or no
            denoiser has a choice.
    """
    refuse(backend)
    able = {name: module for name, module in modules.items() if hasattr(module, "set_attention_backend")}
    if not able:
        raise ConfigError(f"attention_backend={backend!r}: the denoisers of {name} have no choice of it; leave it None")
    try:
        for module in able.values():
            module.set_attention_backend(backend)
        _try(backend.lower(), device, next(iter(able.values())).dtype)
    except (ValueError, RuntimeError, ImportError, TypeError, AttributeError, OSError) as error:
        words = " ".join(str(error).split())[:300]
        raise ConfigError(f"attention_backend={backend!r}: {words}; leave it None for the model's own") from None
    for component, module in able.items():
        fixed = sorted({type(own).__name__ for own in _processors(module) if not hasattr(own, "_attention_backend")})
        if fixed:
            words = f"attention_backend={backend!r} is without effect on {', '.join(fixed)} of {component}"
            progress(f"{words}: diffusers gives them no choice")
            log.warning("%s: diffusers gives them no choice", words)


def _processors(module: Any) -> list[Any]:
    found = [part.__dict__.get("processor") for part in module.modules()]
    return [one for one in found if one is not None]


def _try(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Attends once to little, so that what does not compute here is known before a request asks for it.

    Raises:
        RuntimeError: It does not, and why.
    """
    dispatch = untyped.attention_backends()
    little = torch.zeros(1, 128, 2, 64, device=device, dtype=dtype)  # [rows, tokens, heads, channels]
    try:
        with torch.no_grad():
            dispatch.dispatch_attention_fn(little, little, little, backend=dispatch.AttentionBackendName(backend))
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        words = str(error).strip().partition("\n")[0]
        raise RuntimeError(f"does not compute on {device} in {str(dtype).removeprefix('torch.')} ({words})") from None
