"""HunyuanVideo 1.0, 1.5 and FramePack: joint transformers over text and video."""

from __future__ import annotations

from typing import Any

import tiny
from conformance import parts_video as parts
from conformance.case import PROMPTS, case
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoFramepackPipeline,
    HunyuanVideoFramepackTransformer3DModel,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

_IMAGE_TOKENS = 4
_WORDS = 270


def _text(i: int) -> dict[str, Any]:
    return {
        "prompt": PROMPTS[i], "guidance_scale": 4.0 + i, "height": 16, "width": 16, "num_frames": 5,
        "max_sequence_length": 16, "prompt_template": {"template": "{}", "crop_start": 0},
    }  # fmt: skip


def _text_with_negative(i: int) -> dict[str, Any]:
    return {**_text(i), "negative_prompt": "bad", "true_cfg_scale": 3.0 + i}


def _image(i: int) -> dict[str, Any]:
    template = {
        "template": "<image>{}....<|end_header_id|>", "crop_start": 2, "image_emb_start": 1,
        "image_emb_end": 1 + _IMAGE_TOKENS, "image_emb_len": _IMAGE_TOKENS,
    }  # fmt: skip
    return {**_text(i), "image": parts.picture(i, 16), "max_sequence_length": 24, "prompt_template": template}


def _framepack(i: int) -> dict[str, Any]:
    return {**_text(i), "image": parts.picture(i), "height": 32, "width": 32, "num_frames": 9, "latent_window_size": 3}


def _text_15(i: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[i], "negative_prompt": ("bad", "worse", "ugly")[i], "height": 16, "width": 16,
            "num_frames": 5}  # fmt: skip


def _transformer(kind: Any = HunyuanVideoTransformer3DModel, **extra: Any) -> Any:
    settings: dict[str, Any] = {"in_channels": 4, "patch_size": 1, "guidance_embeds": True, **extra}
    return tiny.scaled(
        kind(
            out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=2, num_single_layers=2,
            num_refiner_layers=1, patch_size_t=1, text_embed_dim=16, pooled_projection_dim=16,
            rope_axes_dim=(2, 4, 4), **settings,
        ), 1.5,
    )  # fmt: skip


def _parts() -> dict[str, Any]:
    return {
        "vae": parts.hunyuan_vae(), "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
        "text_encoder": parts.llama(16), "tokenizer": tiny.tokenizer(16),
        "text_encoder_2": tiny.clip(16, projected=False), "tokenizer_2": tiny.tokenizer(77),
    }  # fmt: skip


@case("HunyuanVideoPipeline", "HunyuanVideo", "text to video", _text)
def text_to_video() -> Any:
    return HunyuanVideoPipeline(transformer=_transformer(), **_parts())


@case("HunyuanVideoPipeline", "HunyuanVideo", "text to video", _text_with_negative, variant="true_cfg")
def text_to_video_true_cfg() -> Any:
    return HunyuanVideoPipeline(transformer=_transformer(), **_parts())


@case("HunyuanVideoImageToVideoPipeline", "HunyuanVideo", "image to video", _image)
def image_to_video() -> Any:
    tokenizer = tiny.tokenizer(64)
    tokenizer.add_tokens(["<image>", "<|end_header_id|>"], special_tokens=True)
    text = parts.llama(16).config
    text.vocab_size = _WORDS
    config = LlavaConfig(
        vision_config=parts.clip_vision_config(16), text_config=text, pad_token_id=0,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    transformer = _transformer(in_channels=4, image_condition_type="token_replace")
    special = {
        "text_encoder": tiny.scaled(LlavaForConditionalGeneration(config), 1.5, 3), "tokenizer": tokenizer,
        "image_processor": parts.clip_processor(),
    }  # fmt: skip
    return HunyuanVideoImageToVideoPipeline(transformer=transformer, **{**_parts(), **special})


@case("HunyuanVideoFramepackPipeline", "FramePack", "image to video", _framepack)
def framepack() -> Any:
    transformer = _transformer(
        HunyuanVideoFramepackTransformer3DModel, patch_size=2, has_image_proj=True, image_proj_dim=16,
        has_clean_x_embedder=True,
    )  # fmt: skip
    config = SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16
    )
    vision = {
        "image_encoder": tiny.scaled(SiglipVisionModel(config), 1.5, 6),
        "feature_extractor": SiglipImageProcessorPil(size={"height": 32, "width": 32}),
    }
    return HunyuanVideoFramepackPipeline(transformer=transformer, **vision, **_parts())


def _qwen_text() -> Any:
    config = Qwen2_5_VLTextConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=tiny.VOCABULARY, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        rope_scaling={"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
    )  # fmt: skip
    return tiny.scaled(Qwen2_5_VLTextModel(config), 1.5, 3)


@case("HunyuanVideo15Pipeline", "HunyuanVideo 1.5", "text to video", _text_15, steps=(2, 3, 4))
def text_to_video_15() -> Any:
    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=16, text_embed_2_dim=32, image_embed_dim=12,
        rope_axes_dim=(2, 2, 4), target_size=16, task_type="t2v",
    )  # fmt: skip
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(16, 16), layers_per_block=1, spatial_compression_ratio=4,
        temporal_compression_ratio=2, downsample_match_channel=False, upsample_match_channel=False,
    )  # fmt: skip
    tokenizer = tiny.tokenizer(16)
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    pipeline = HunyuanVideo15Pipeline(
        transformer=tiny.scaled(transformer, 1.5), vae=tiny.scaled(vae), text_encoder=_qwen_text(),
        tokenizer=tokenizer, text_encoder_2=tiny.t5(32), tokenizer_2=tiny.tokenizer(16),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0), guider=ClassifierFreeGuidance(guidance_scale=4.0),
    )  # fmt: skip
    pipeline.prompt_template_encode_start_idx = 0
    pipeline.tokenizer_max_length = pipeline.tokenizer_2_max_length = 16
    pipeline.vision_num_semantic_tokens = 8
    return pipeline
