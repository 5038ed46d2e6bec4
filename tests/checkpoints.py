"""Tiny models as files: folders, and single files in the layouts in which models were published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch
from conformance import parts_sd
from diffusers import DiffusionPipeline, StableDiffusionPipeline


def stable_diffusion() -> Any:
    return StableDiffusionPipeline(**parts_sd.parts())


def load(folder: Path, **options: Any) -> Any:
    """What diffusers itself makes of a folder."""
    return DiffusionPipeline.from_pretrained(folder, **options)


_RESNET = [("in_layers.0", "norm1"), ("in_layers.2", "conv1"), ("out_layers.0", "norm2"), ("out_layers.3", "conv2"),
           ("emb_layers.1", "time_emb_proj"), ("skip_connection", "conv_shortcut")]  # fmt: skip
_TOP = [("time_embed.0", "time_embedding.linear_1"), ("time_embed.2", "time_embedding.linear_2"),
        ("input_blocks.0.0", "conv_in"), ("out.0", "conv_norm_out"), ("out.2", "conv_out")]  # fmt: skip
_ATTENTION = [("norm", "group_norm"), ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")]


def _unet_blocks(layers: int, levels: int) -> list[tuple[str, str]]:
    """Beginnings of names in the original layout and in diffusers'."""
    pairs = [("middle_block.1.", "mid_block.attentions.0.")]
    pairs += [(f"middle_block.{2 * j}.", f"mid_block.resnets.{j}.") for j in range(2)]
    for i in range(levels):
        first, last = (layers + 1) * i, (layers + 1) * i + layers
        for j in range(layers):
            pairs.append((f"input_blocks.{first + j + 1}.0.", f"down_blocks.{i}.resnets.{j}."))
            pairs.append((f"input_blocks.{first + j + 1}.1.", f"down_blocks.{i}.attentions.{j}."))
        pairs.append((f"input_blocks.{last + 1}.0.op.", f"down_blocks.{i}.downsamplers.0.conv."))
        for j in range(layers + 1):
            pairs.append((f"output_blocks.{first + j}.0.", f"up_blocks.{i}.resnets.{j}."))
            pairs.append((f"output_blocks.{first + j}.1.", f"up_blocks.{i}.attentions.{j}."))
        pairs.append((f"output_blocks.{last}.{1 if i == 0 else 2}.", f"up_blocks.{i}.upsamplers.0."))
    return pairs


def _unet_name(name: str, blocks: list[tuple[str, str]]) -> str:
    for ours, theirs in _TOP:
        if name.startswith(f"{theirs}."):
            return name.replace(theirs, ours, 1)
    for ours, theirs in blocks:
        if name.startswith(theirs):
            rest = name.removeprefix(theirs)
            for original, here in _RESNET if "resnets" in theirs else ():
                rest = rest.replace(here, original)
            return ours + rest
    raise KeyError(name)


def _vae_name(name: str, levels: int) -> str:
    for j in range(2):
        name = name.replace(f"mid_block.resnets.{j}.", f"mid.block_{j + 1}.")
    if "mid_block.attentions.0." in name:
        head, _, rest = name.partition("mid_block.attentions.0.")
        for original, here in _ATTENTION:
            if rest.startswith(f"{here}."):
                return f"{head}mid.attn_1.{original}{rest.removeprefix(here)}"
    for i in range(levels):
        name = name.replace(f"down_blocks.{i}.resnets.", f"down.{i}.block.")
        name = name.replace(f"down_blocks.{i}.downsamplers.0.", f"down.{i}.downsample.")
        name = name.replace(f"up_blocks.{i}.resnets.", f"up.{levels - 1 - i}.block.")
        name = name.replace(f"up_blocks.{i}.upsamplers.0.", f"up.{levels - 1 - i}.upsample.")
    return name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")


def original_layout(pipe: Any) -> dict[str, torch.Tensor]:
    """The weights of a Stable Diffusion pipeline under the names under which they were published."""
    tensors: dict[str, torch.Tensor] = {}
    blocks = _unet_blocks(pipe.unet.config.layers_per_block, len(pipe.unet.config.block_out_channels))
    for name, value in pipe.unet.state_dict().items():
        tensors[f"model.diffusion_model.{_unet_name(name, blocks)}"] = value
    levels = len(pipe.vae.config.block_out_channels)
    for name, value in pipe.vae.state_dict().items():
        own = _vae_name(name, levels)
        flat = "mid.attn_1" in own and value.ndim == 2
        tensors[f"first_stage_model.{own}"] = value[:, :, None, None] if flat else value
    for name, value in pipe.text_encoder.state_dict().items():
        tensors[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    return {name: value.contiguous().clone() for name, value in tensors.items()}


def flux_wide() -> Any:
    """A tiny Flux whose linear layers are wide enough for blocks of 32 weights."""
    from diffusers import FluxTransformer2DModel

    pipe = tiny.flux()
    config = {**pipe.transformer.config, "num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 16}
    config = {name: value for name, value in config.items() if not name.startswith("_")}
    pipe.transformer = tiny.scaled(FluxTransformer2DModel(**config), 1.5)
    return pipe


def write_gguf(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """A file in llama.cpp's format: matrices whose rows are multiples of 32 as Q8_0, the others as they are."""
    import gguf

    writer = gguf.GGUFWriter(file, "flux")
    for name, value in tensors.items():
        array = value.float().numpy()
        if array.ndim == 2 and array.shape[-1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
