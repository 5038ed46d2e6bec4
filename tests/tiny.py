"""Tiny random-weight pipelines in stock diffusers classes, built in seconds without network.

Weights are scaled up until the latents really depend on prompt, guidance and seed: an equality test means nothing on a
model that does not care.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    ControlNetModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPAGPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

VOCABULARY = 260


def tokenizer(length: int = 16) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: any text, no download."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{c: i + 3 for i, c in enumerate(alphabet)}}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=length
    )


def scaled(module: Any, factor: float = 1.0, seed: int = 0) -> Any:
    """Random weights large enough that outputs depend on inputs, the same in every run."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                fan = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=noise) * factor / fan**0.5)
            else:  # norms and biases
                start = 0.0 if parameter.abs().max() < 0.5 else 1.0
                parameter.copy_(start + torch.randn(parameter.shape, generator=noise) * 0.1 * factor)
    return module.eval()


def clip(width: int = 32, *, projected: bool = True, seed: int = 0) -> Any:
    config = CLIPTextConfig(
        hidden_size=width, intermediate_size=2 * width, projection_dim=width, num_attention_heads=4,
        num_hidden_layers=3, vocab_size=VOCABULARY, max_position_embeddings=77,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return scaled((CLIPTextModelWithProjection if projected else CLIPTextModel)(config), 1.5, seed)


def t5(width: int = 32, kind: Any = T5EncoderModel, config: Any = T5Config) -> Any:
    return scaled(
        kind(config(vocab_size=VOCABULARY, d_model=width, d_kv=8, d_ff=64, num_layers=2, num_heads=4)), 1.5, 3
    )


def vae(channels: int = 4, **extra: Any) -> Any:
    return scaled(
        AutoencoderKL(
            block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=channels, norm_num_groups=4,
            layers_per_block=1, sample_size=32, **extra,
        ), 1.0, 5,
    )  # fmt: skip


def sd3() -> Any:
    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=64,
        pos_embed_max_size=32,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=scaled(transformer), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(shift_factor=0.1, scaling_factor=1.5),
        text_encoder=clip(seed=1), tokenizer=tokenizer(), text_encoder_2=clip(seed=2), tokenizer_2=tokenizer(),
        text_encoder_3=t5(64), tokenizer_3=tokenizer(),
    )  # fmt: skip


def flux() -> Any:
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )  # fmt: skip
    return FluxPipeline(
        transformer=scaled(transformer, 1.5), scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae(shift_factor=0.1, scaling_factor=1.5), text_encoder=clip(projected=False), tokenizer=tokenizer(),
        text_encoder_2=t5(32), tokenizer_2=tokenizer(),
    )  # fmt: skip


def _unet() -> Any:
    return UNet2DConditionModel(
        block_out_channels=(16, 32), layers_per_block=1, sample_size=16, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, transformer_layers_per_block=(1, 1), cross_attention_dim=64, norm_num_groups=4,
        projection_class_embeddings_input_dim=32 + 6 * 8,
    )  # fmt: skip


def _sdxl_parts() -> dict[str, Any]:
    return {
        "unet": scaled(_unet(), 1.2), "scheduler": EulerDiscreteScheduler(
            beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
        ),
        "vae": vae(), "text_encoder": clip(projected=False, seed=1), "tokenizer": tokenizer(),
        "text_encoder_2": clip(seed=2), "tokenizer_2": tokenizer(),
    }  # fmt: skip


def sdxl() -> Any:
    return StableDiffusionXLPipeline(**_sdxl_parts())


def sdxl_half_vae() -> Any:
    """As published: the VAE in float16, to be decoded in float32 (``force_upcast``)."""
    parts = _sdxl_parts()
    parts["vae"] = vae(force_upcast=True).half()
    return StableDiffusionXLPipeline(**parts)


def sdxl_pag() -> Any:
    return StableDiffusionXLPAGPipeline(**_sdxl_parts(), pag_applied_layers="mid")


def controlnet() -> Any:
    net = ControlNetModel(
        block_out_channels=(16, 32), layers_per_block=1, in_channels=4, cross_attention_dim=64,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=(2, 4),
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 1), projection_class_embeddings_input_dim=32 + 6 * 8, norm_num_groups=4,
        conditioning_embedding_out_channels=(8, 16),
    )  # fmt: skip
    return StableDiffusionXLControlNetPipeline(**_sdxl_parts(), controlnet=scaled(net, 1.2, 7))


def qwen_image() -> Any:
    text = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}, "rope_theta": 1e6,
            "vocab_size": VOCABULARY,
        },
        vision_config={"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32},
        vocab_size=VOCABULARY, image_token_id=250, video_token_id=251, vision_start_token_id=252,
        vision_end_token_id=253,
    )  # fmt: skip
    transformer = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=32, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    autoencoder = AutoencoderKLQwenImage(
        base_dim=12, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    return QwenImagePipeline(
        transformer=scaled(transformer, 1.5), vae=scaled(autoencoder), tokenizer=tokenizer(512),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        text_encoder=scaled(Qwen2_5_VLForConditionalGeneration(text), 1.5),
    )  # fmt: skip


def wan() -> Any:
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
        text_dim=32, freq_dim=32, ffn_dim=32, num_layers=2, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip
    autoencoder = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    return WanPipeline(
        transformer=scaled(transformer, 1.5), vae=scaled(autoencoder), tokenizer=tokenizer(16),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        text_encoder=t5(32, UMT5EncoderModel, UMT5Config),
    )  # fmt: skip
