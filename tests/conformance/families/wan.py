"""Wan 2.1, Wan 2.2 and VACE: flow matching with text cross-attention."""

from __future__ import annotations

from typing import Any

import tiny
from conformance import parts_video as parts
from conformance.case import PROMPTS, case
from diffusers import (
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
    WanVideoToVideoPipeline,
)

for _module in ("wan.pipeline_wan_i2v", "wan.pipeline_wan_video2video", "wan.pipeline_wan_vace"):
    parts.without_ftfy(_module)

_SIZES = {"height": 16, "width": 16, "max_sequence_length": 16}


def _text(i: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[i], "negative_prompt": "bad", "guidance_scale": 4.0 + i, "num_frames": 5, **_SIZES}


def _two_guidances(i: int) -> dict[str, Any]:
    return {**_text(i), "guidance_scale_2": 3.0 + i}


def _image(i: int) -> dict[str, Any]:
    return {"image": parts.picture(i, 16), **_text(i)}


def _image_22(i: int) -> dict[str, Any]:
    return {**_image(i), "height": 32, "width": 32}


def _video(i: int) -> dict[str, Any]:
    video = {"video": parts.clip(i, 5, 16), "strength": 0.8}
    return {"prompt": PROMPTS[i], "negative_prompt": "bad", "guidance_scale": 4.0 + i, **_SIZES, **video}


def _vace(i: int) -> dict[str, Any]:
    return {**_text(i), "video": parts.clip(i, 5, 16), "conditioning_scale": 0.7}


def _transformer(kind: Any = WanTransformer3DModel, seed: int = 0, **extra: Any) -> Any:
    sizes: dict[str, Any] = {"in_channels": 16, "out_channels": 16, **extra}
    return tiny.scaled(
        kind(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, text_dim=32, freq_dim=32, ffn_dim=32,
            num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32, **sizes,
        ), 1.5, seed,
    )  # fmt: skip


def _parts() -> dict[str, Any]:
    return {
        "vae": parts.wan_vae(), "tokenizer": tiny.tokenizer(16), "scheduler": parts.flow_unipc(),
        "text_encoder": parts.umt5(),
    }  # fmt: skip


@case("WanPipeline", "Wan", "text to video", _text)
def text_to_video() -> Any:
    return WanPipeline(transformer=_transformer(), **_parts())


@case("WanPipeline", "Wan", "text to video", _two_guidances, variant="2.2", steps=(4, 5, 6))
def text_to_video_22() -> Any:
    """Each of the three spends two steps on the first expert: on different experts they would not meet."""
    experts = {"transformer": _transformer(), "transformer_2": _transformer(seed=1)}
    return WanPipeline(**experts, **_parts(), boundary_ratio=0.875)


@case("WanImageToVideoPipeline", "Wan", "image to video", _image)
def image_to_video() -> Any:
    transformer = _transformer(in_channels=36, image_dim=16, added_kv_proj_dim=24)
    encoder = {"image_encoder": parts.clip_vision(), "image_processor": parts.clip_processor()}
    return WanImageToVideoPipeline(transformer=transformer, **encoder, **_parts())


@case("WanImageToVideoPipeline", "Wan", "image to video", _image_22, variant="2.2")
def image_to_video_22() -> Any:
    """The 5B model: one transformer, a timestep per token, the first frame given."""
    vae = parts.wan_vae(in_channels=12, out_channels=12, patch_size=2, is_residual=True, scale_factor_spatial=16)
    return WanImageToVideoPipeline(transformer=_transformer(), **{**_parts(), "vae": vae}, expand_timesteps=True)


@case("WanVideoToVideoPipeline", "Wan", "video to video", _video, steps=(4, 5, 6))
def video_to_video() -> Any:
    return WanVideoToVideoPipeline(transformer=_transformer(), **_parts())


@case("WanVACEPipeline", "Wan VACE", "control", _vace)
def vace() -> Any:
    transformer = _transformer(WanVACETransformer3DModel, vace_layers=[0, 1], vace_in_channels=96)
    return WanVACEPipeline(transformer=transformer, **_parts())
