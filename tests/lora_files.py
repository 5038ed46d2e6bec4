"""LoRA files for the tiny pipelines, as diffusers' training scripts write them, and the oracle: diffusers alone."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import torch
from diffusers.utils import convert_state_dict_to_diffusers
from driving import alone
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from steploom.requests import DiffusionRequest

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def denoiser(pipe: Any) -> tuple[str, Any]:
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    return name, getattr(pipe, name)


def _add(module: Any, seed: int, strength: float, **settings: Any) -> Any:
    """An adapter whose both matrices are random: as initialised it would do nothing."""
    noise = torch.Generator().manual_seed(seed)
    module.add_adapter(LoraConfig(r=4, lora_alpha=8, **settings))
    for name, parameter in module.named_parameters():
        if "lora_" in name and parameter.ndim > 1:
            parameter.data = torch.randn(parameter.shape, generator=noise) * strength / parameter.shape[1] ** 0.5
    return get_peft_model_state_dict(module)


def save(
    build: Callable[[], Any],
    folder: pathlib.Path,
    seed: int,
    *,
    text: bool = False,
    dora: bool = False,
    targets: tuple[str, ...] = ATTENTION,
    strength: float = 1.0,
) -> str:
    """Writes an adapter for ``build``'s denoiser, and for its first text encoder with ``text``; the folder."""
    pipe = build()
    name, module = denoiser(pipe)
    state = {f"{name}_lora_layers": _add(module, seed, strength, target_modules=list(targets), use_dora=dora)}
    if text:
        found = _add(pipe.text_encoder, seed + 100, strength, target_modules=["q_proj", "v_proj"])
        state["text_encoder_lora_layers"] = convert_state_dict_to_diffusers(found)
    pipe.save_lora_weights(str(folder), **state)
    return str(folder)


def adapted(pipe: Any, chosen: tuple[tuple[str, float], ...]) -> Any:
    """``pipe`` with these adapters, as a user of diffusers sets them."""
    names = [f"adapter_{i}" for i in range(len(chosen))]
    for name, (path, _) in zip(names, chosen, strict=True):
        where = pathlib.Path(path)
        if where.is_file():
            pipe.load_lora_weights(str(where.parent), weight_name=where.name, adapter_name=name)
        else:
            pipe.load_lora_weights(path, adapter_name=name)
    if names:
        pipe.set_adapters(names, [scale for _, scale in chosen])
    return pipe


def alone_with_lora(build: Callable[[], Any], request: DiffusionRequest) -> Any:
    """What diffusers gives for ``request`` alone, on a pipeline of its own."""
    return alone(adapted(build(), request.adapters), request)
