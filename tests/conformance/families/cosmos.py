"""Cosmos 1, 2, 2.5 and 3: world models, text and video to video."""

from __future__ import annotations

from typing import Any

import tiny
from conformance import parts_video as parts
from conformance.case import PROMPTS, case
from diffusers import (
    AutoencoderKLCosmos,
    Cosmos2_5_PredictBasePipeline,
    Cosmos2TextToImagePipeline,
    Cosmos2VideoToWorldPipeline,
    Cosmos3OmniPipeline,
    Cosmos3OmniTransformer,
    CosmosTextToWorldPipeline,
    CosmosTransformer3DModel,
    CosmosVideoToWorldPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from steploom.weave.batching import unlike

parts.without_torchvision()


_PACKED = f"{unlike.UNLIKE}: vision_tokens differs"
"""One packed sequence of text and video tokens has no batch axis: all is shared."""


class _AllIsSafe:
    """Stands in for the guardrail models."""

    def to(self, device: Any) -> None: ...

    def check_text_safety(self, text: str) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


def _picture(i: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[i], "negative_prompt": "bad", "guidance_scale": 3.0 + i, "height": 32, "width": 32,
            "max_sequence_length": 16}  # fmt: skip


def _text(i: int) -> dict[str, Any]:
    return {**_picture(i), "num_frames": 9}


def _image(i: int) -> dict[str, Any]:
    return {**_text(i), "image": parts.picture(i)}


def _video(i: int) -> dict[str, Any]:
    return {**_text(i), "video": parts.clip(i, 5)}


def _omni(i: int) -> dict[str, Any]:
    return {
        "prompt": PROMPTS[i], "negative_prompt": "bad", "guidance_scale": 3.0 + i, "height": 16, "width": 16,
        "num_frames": 5, "use_system_prompt": False, "add_resolution_template": False, "add_duration_template": False,
    }  # fmt: skip


def _omni_image(i: int) -> dict[str, Any]:
    return {**_omni(i), "image": parts.picture(i, 16)}


def _transformer(channels: int = 16, extra: int = 0, text: int = 32, **settings: Any) -> Any:
    return tiny.scaled(
        CosmosTransformer3DModel(
            in_channels=channels + extra, out_channels=channels, num_attention_heads=2, attention_head_dim=16,
            num_layers=2, mlp_ratio=2, text_embed_dim=text, adaln_lora_dim=4, max_size=(4, 32, 32), **settings,
        ), 1.5,
    )  # fmt: skip


def _parts() -> dict[str, Any]:
    return {"text_encoder": tiny.t5(32), "tokenizer": tiny.tokenizer(16), "safety_checker": _AllIsSafe()}


def _first() -> dict[str, Any]:
    vae = AutoencoderKLCosmos(
        latent_channels=4, encoder_block_out_channels=(8,) * 4, decode_block_out_channels=(8,) * 4,
        attention_resolutions=(8,), resolution=64, spatial_compression_ratio=4, temporal_compression_ratio=4,
    )  # fmt: skip
    scheduler = EDMEulerScheduler(sigma_data=0.5, final_sigmas_type="sigma_min")
    return {**_parts(), "vae": tiny.scaled(vae, 1.0, 5), "scheduler": scheduler}


def _second() -> dict[str, Any]:
    return {**_parts(), "vae": parts.wan_vae(), "scheduler": FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)}


@case("CosmosTextToWorldPipeline", "Cosmos", "text to video", _text)
def text_to_world() -> Any:
    return CosmosTextToWorldPipeline(transformer=_transformer(4), **_first())


@case("CosmosVideoToWorldPipeline", "Cosmos", "image to video", _image)
def video_to_world() -> Any:
    return CosmosVideoToWorldPipeline(transformer=_transformer(4, 1), **_first())


@case("Cosmos2TextToImagePipeline", "Cosmos Predict 2", "text to image", _picture)
def text_to_image_2() -> Any:
    return Cosmos2TextToImagePipeline(transformer=_transformer(extra_pos_embed_type=None), **_second())


@case("Cosmos2VideoToWorldPipeline", "Cosmos Predict 2", "image to video", _image)
def video_to_world_2() -> Any:
    return Cosmos2VideoToWorldPipeline(transformer=_transformer(extra=1, extra_pos_embed_type=None), **_second())


@case("Cosmos2_5_PredictBasePipeline", "Cosmos Predict 2.5", "video to video", _video)
def predict_25() -> Any:
    tokenizer = tiny.tokenizer(16)
    tokenizer.chat_template = "{{ messages[-1]['content'][0]['text'] }}"
    settings = {**_second(), "text_encoder": parts.qwen_vl(32), "tokenizer": tokenizer}
    transformer = _transformer(
        extra=1, use_crossattn_projection=True, crossattn_proj_in_channels=64, encoder_hidden_states_channels=32
    )
    return Cosmos2_5_PredictBasePipeline(transformer=transformer, **{**settings, "scheduler": parts.flow_unipc()})


def _omni_pipeline() -> Any:
    tokenizer = tiny.tokenizer(64)
    tokenizer.add_tokens(["<|im_end|>", "<|vision_start|>", "<|vision_end|>"], special_tokens=True)
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    transformer = Cosmos3OmniTransformer(
        head_dim=12, hidden_size=24, intermediate_size=32, latent_channel=16, latent_patch_size=1,
        num_attention_heads=2, num_hidden_layers=2, num_key_value_heads=1, patch_latent_dim=16,
        rope_axes_dim=[2, 2, 2], vocab_size=270,
    )  # fmt: skip
    return Cosmos3OmniPipeline(
        transformer=tiny.scaled(transformer, 1.5), vae=parts.wan_vae(), text_tokenizer=tokenizer,
        scheduler=parts.flow_unipc(), enable_safety_checker=False,
    )  # fmt: skip


@case("Cosmos3OmniPipeline", "Cosmos 3", "text to video", _omni, alone=_PACKED)
def omni() -> Any:
    return _omni_pipeline()


@case("Cosmos3OmniPipeline", "Cosmos 3", "image to video", _omni_image, variant="image", alone=_PACKED)
def omni_image() -> Any:
    return _omni_pipeline()
