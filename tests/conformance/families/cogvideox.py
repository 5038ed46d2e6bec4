"""CogVideoX and ConsisID: expert transformers over text and video tokens."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from conformance import parts_video as parts
from conformance.case import PROMPTS, case
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    CogVideoXVideoToVideoPipeline,
    ConsisIDTransformer3DModel,
)
from diffusers.pipelines.consisid.pipeline_consisid import ConsisIDPipeline  # at the top only with OpenCV


def _prompt(i: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[i], "negative_prompt": "bad", "guidance_scale": 4.0 + i, "height": 16, "width": 16,
            "max_sequence_length": 16}  # fmt: skip


def _text(i: int) -> dict[str, Any]:
    return {**_prompt(i), "num_frames": 9}


def _image(i: int) -> dict[str, Any]:
    return {**_text(i), "image": parts.picture(i, 16)}


def _video(i: int) -> dict[str, Any]:
    return {**_prompt(i), "video": parts.clip(i, 9, 16), "strength": 0.8}


def _face(i: int) -> dict[str, Any]:
    noise = torch.Generator().manual_seed(i)
    features = [torch.randn((1, 2, 8), generator=noise)]
    return {**_image(i), "id_vit_hidden": features, "id_cond": torch.randn((1, 8), generator=noise)}


def _transformer(kind: Any = CogVideoXTransformer3DModel, channels: int = 4, **extra: Any) -> Any:
    return tiny.scaled(
        kind(
            num_attention_heads=2, attention_head_dim=16, in_channels=channels, out_channels=4, time_embed_dim=8,
            text_embed_dim=32, num_layers=2, sample_width=2, sample_height=2, sample_frames=9,
            max_text_seq_length=16, **extra,
        ), 1.5,
    )  # fmt: skip


def _parts() -> dict[str, Any]:
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8,) * 4, latent_channels=4, layers_per_block=1, norm_num_groups=2,
    )  # fmt: skip
    return {"vae": tiny.scaled(vae, 1.0, 5), "text_encoder": tiny.t5(32), "tokenizer": tiny.tokenizer(16)}


def _ddim() -> Any:
    return CogVideoXDDIMScheduler(beta_schedule="scaled_linear", snr_shift_scale=3.0, timestep_spacing="trailing",
                                  rescale_betas_zero_snr=True, prediction_type="v_prediction")  # fmt: skip


def _dpm() -> Any:
    return CogVideoXDPMScheduler.from_config(_ddim().config)


@case("CogVideoXPipeline", "CogVideoX", "text to video", _text)
def text_to_video() -> Any:
    return CogVideoXPipeline(transformer=_transformer(), scheduler=_ddim(), **_parts())


@case("CogVideoXImageToVideoPipeline", "CogVideoX", "image to video", _image)
def image_to_video() -> Any:
    """As the 5B model: rotary positions, and the noise scheduler that keeps its last estimate."""
    rotary = {"use_rotary_positional_embeddings": True, "use_learned_positional_embeddings": True}
    return CogVideoXImageToVideoPipeline(transformer=_transformer(channels=8, **rotary), scheduler=_dpm(), **_parts())


@case("CogVideoXVideoToVideoPipeline", "CogVideoX", "video to video", _video, steps=(4, 5, 6))
def video_to_video() -> Any:
    return CogVideoXVideoToVideoPipeline(transformer=_transformer(), scheduler=_ddim(), **_parts())


@case("ConsisIDPipeline", "ConsisID", "image to video", _face)
def face_to_video() -> Any:
    transformer = _transformer(
        ConsisIDTransformer3DModel, 8, use_rotary_positional_embeddings=True, use_learned_positional_embeddings=True,
        cross_attn_interval=1, is_train_face=True, cross_attn_dim_head=4, cross_attn_num_heads=2, LFE_id_dim=8,
        LFE_vit_dim=8, LFE_depth=5, LFE_dim_head=8, LFE_num_heads=2, LFE_num_id_token=1, LFE_num_querie=4,
        LFE_output_dim=21, LFE_ff_mult=1, LFE_num_scale=1,
    )  # fmt: skip
    return ConsisIDPipeline(transformer=transformer, scheduler=_dpm(), **_parts())
