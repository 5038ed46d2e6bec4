"""Pipelines from architectures: parameters made on the device at random, nothing read and nothing downloaded."""

from __future__ import annotations

import functools
import inspect
import json
import os
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights

from gpu.architectures import ARCHITECTURES, Architecture

GAIN = 0.5
"""Of the weights, in units of ``1 / sqrt(inputs)``: small enough that 60 blocks stay finite in float16."""

PROMPT_TOKENS = 77
CHOICE = "GPU_BENCHMARK_MODEL"
"""Environment variable that tells a worker's :func:`made` what to build."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def build(
    name: str, *, tiny: bool = False, device: str = "cuda", dtype: str = "bfloat16", encoders: bool = True
) -> Any:
    """The pipeline of that architecture.

    Args:
        name: Key of :data:`gpu.architectures.ARCHITECTURES`.
        tiny: A CPU's size.
        device: Where parameters are made.
        dtype: Their dtype; what diffusers keeps in float32 stays so.
        encoders: With text encoders. Without, requests have to give embeddings.
    """
    architecture = ARCHITECTURES[name]
    parts: dict[str, Any] = {}
    for component, (kind, arguments) in architecture.parts.items():
        given = {**arguments, **(architecture.tiny[component] if tiny else {})}
        parts[component] = _filled(_empty(getattr(diffusers, kind), given), device, _DTYPES[dtype])
    for component, (kind, config, arguments) in architecture.encoders.items():
        given = {**arguments, **(architecture.tiny_encoders[component] if tiny else {})}
        parts[component] = _filled(_empty_encoder(kind, config, given), device, _DTYPES[dtype]) if encoders else None
        parts[component.replace("text_encoder", "tokenizer")] = tokenizer() if encoders else None
    kind, arguments = architecture.scheduler
    parts["scheduler"] = getattr(diffusers, kind)(**arguments)
    pipeline = _completed(getattr(diffusers, architecture.pipeline), parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def made() -> Any:
    """The pipeline that :data:`CHOICE` describes, for ``EngineConfig(model="gpu.models:made")`` in a worker process."""
    return build(**json.loads(os.environ[CHOICE]))


@functools.cache
def parameters_of(name: str, tiny: bool) -> dict[str, int]:
    """How many parameters each component has, without making them."""
    architecture, sizes = ARCHITECTURES[name], {}
    for component, (kind, arguments) in architecture.parts.items():
        given = {**arguments, **(architecture.tiny[component] if tiny else {})}
        module = _empty(getattr(diffusers, kind), given)
        sizes[component] = sum(parameter.numel() for parameter in module.parameters())
    for component, (kind, config, arguments) in architecture.encoders.items():
        given = {**arguments, **(architecture.tiny_encoders[component] if tiny else {})}
        module = _empty_encoder(kind, config, given)
        sizes[component] = sum(parameter.numel() for parameter in module.parameters())
    return sizes


def request(name: str, size: int, seed: int, *, tiny: bool, device: str, dtype: str) -> dict[str, Any]:
    """Arguments of one request: embeddings of the published shapes ``[1, tokens, width]``, drawn by ``seed``.

    Args:
        name: The architecture.
        size: Height and width in pixels.
        seed: Of its embeddings; no two requests have the same.
        tiny: As :func:`build`.
        device: Where the embeddings are made.
        dtype: Their dtype.
    """
    architecture = ARCHITECTURES[name]
    source = torch.Generator(device).manual_seed(seed)
    given: dict[str, Any] = {**architecture.arguments, **extent(architecture, size)}
    for argument, shape in (architecture.tiny_embeddings if tiny else architecture.embeddings).items():
        if argument.endswith("_mask"):
            given[argument] = torch.ones(shape, device=device, dtype=torch.long)
        else:
            given[argument] = torch.randn(shape, generator=source, device=device).to(_DTYPES[dtype])
    return given


def worded(name: str, size: int, seed: int, *, tiny: bool) -> dict[str, Any]:
    """Arguments of a request whose prompt has to be encoded: words that no request had before."""
    architecture = ARCHITECTURES[name]
    given = {**architecture.arguments, **extent(architecture, size), "prompt": f"picture number {seed} " * 3}
    if architecture.calls_per_step == 2:
        given["negative_prompt"] = f"not number {seed}"
    length = {"StableDiffusion3Pipeline": 256, "FluxPipeline": 512, "WanPipeline": 512}.get(architecture.pipeline)
    if length is not None:
        given["max_sequence_length"] = 16 if tiny else length
    return given


def extent(architecture: Architecture, size: int) -> dict[str, int]:
    """Arguments that say how large the output is."""
    frames = {} if architecture.frames is None else {"num_frames": architecture.frames.get(size, 5)}
    return {"height": size, "width": size, **frames}


def tokenizer() -> Any:
    """Tokens of single bytes: any text, no vocabulary to download."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{sign: place + 3 for place, sign in enumerate(alphabet)}}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    ends = [("<s>", 1), ("</s>", 2)]
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=PROMPT_TOKENS
    )


def _empty(kind: Any, arguments: dict[str, Any]) -> Any:
    """A module of diffusers whose parameters have shapes and no memory. What it computes at its start is there."""
    with init_empty_weights(include_buffers=False):
        return kind(**arguments)


def _config(kind: str, arguments: dict[str, Any]) -> Any:
    clip = {"vocab_size": 49408, "max_position_embeddings": PROMPT_TOKENS}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    given = {**clip, **ids, **arguments} if kind == "CLIPTextConfig" else arguments
    return getattr(transformers, kind)(**given)


def _empty_encoder(kind: str, config: str, arguments: dict[str, Any]) -> Any:
    with init_empty_weights(include_buffers=False):
        module = getattr(transformers, kind)(_config(config, arguments))
    module.tie_weights()
    return module


def _filled(module: Any, device: str, dtype: torch.dtype, seed: int = 0) -> Any:
    """``module`` on the device, its parameters drawn there one by one: no copy of the model on the host."""
    source = torch.Generator(device).manual_seed(seed)
    in_float32 = getattr(module, "_keep_in_fp32_modules", None) or []
    done: dict[int, torch.nn.Parameter] = {}  # tied weights stay tied
    for path, parameter in list(module.named_parameters(remove_duplicate=False)):
        home, _, leaf = path.rpartition(".")
        if id(parameter) not in done:
            kept = dtype != torch.float32 and any(part in path.split(".") for part in in_float32)
            made = torch.empty(parameter.shape, device=device, dtype=torch.float32 if kept else dtype)
            done[id(parameter)] = torch.nn.Parameter(_drawn(made, leaf, source), requires_grad=False)
        setattr(module.get_submodule(home), leaf, done[id(parameter)])
    for path, buffer in list(module.named_buffers()):
        home, _, leaf = path.rpartition(".")
        module.get_submodule(home)._buffers[leaf] = buffer.to(device)
    return module.eval()


def _drawn(tensor: torch.Tensor, leaf: str, source: torch.Generator) -> torch.Tensor:
    """Normal weights that keep the scale of what they multiply; gains around one, biases around zero."""
    with torch.no_grad():
        if tensor.ndim > 1:
            return tensor.normal_(std=GAIN / max(1, tensor[0].numel()) ** 0.5, generator=source)
        return tensor.normal_(mean=0.0 if "bias" in leaf else 1.0, std=0.02, generator=source)


def _completed(kind: Any, parts: dict[str, Any]) -> Any:
    """The pipeline of these parts; those that it expects besides are left out."""
    wanted = inspect.signature(kind.__init__).parameters
    missing = [name for name, p in wanted.items() if p.default is p.empty and name not in ("self", *parts)]
    return kind(**parts, **dict.fromkeys(missing))
