"""Claims: what the table says of a model beyond what the engine has measured, each checked on the model itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from conformance.case import Case

from steploom.worker.models import loading
from steploom.worker.trials import trial

NO_MASK = "it takes no mask for text"
LEAKS = "its mask does not hide padding"

_TOKENS = 3


class _Reached(Exception):
    """The pipeline has called its denoiser."""


def takes_no_mask(case: Case) -> bool:
    """Whether the denoiser has no argument for a mask."""
    return not _masks(loading.denoiser_of(case.build()))


def lets_padding_through(case: Case) -> bool:
    """Whether text that is zero-padded, and masked there, gives another result than the text alone."""
    pipeline = case.build()
    pipeline.set_progress_bar_config(disable=True)
    denoiser = loading.denoiser_of(pipeline)
    args, kwargs = _first_call(pipeline, denoiser, case)
    (mask,), text = _masks(denoiser), kwargs["encoder_hidden_states"]
    real = kwargs.get(mask)
    real = torch.ones(text.shape[:2]) if real is None else real
    longer = {
        "encoder_hidden_states": torch.nn.functional.pad(text, (0, 0, 0, _TOKENS)),
        mask: torch.nn.functional.pad(real.float(), (0, _TOKENS)).to(real.dtype),
    }
    with torch.no_grad():
        plain, padded = denoiser(*args, **kwargs), denoiser(*args, **{**kwargs, **longer})
    return trial.distance(padded, plain) > case.tolerance


CHECKS: dict[str, Callable[[Case], bool]] = {NO_MASK: takes_no_mask, LEAKS: lets_padding_through}
"""Whether a claim holds of a case."""


def _masks(denoiser: Any) -> list[str]:
    return [name for name in inspect.signature(denoiser.forward).parameters if "mask" in name]


def _first_call(pipeline: Any, denoiser: Any, case: Case) -> tuple[tuple[Any, ...], dict[str, Any]]:
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def stop(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))
        raise _Reached

    hook = denoiser.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        trial.run_alone(pipeline, case.request(0))
    except _Reached:
        pass
    finally:
        hook.remove()
    return seen[0]
