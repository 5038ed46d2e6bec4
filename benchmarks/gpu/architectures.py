"""The architectures, as their published configurations say, and beside each the same one tiny.

Numbers are those of the ``config.json`` files of the repositories named in :data:`ARCHITECTURES`, without the hub:
nothing is downloaded. The tiny ones are of the same classes with the same switches, for a CPU.
"""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One pipeline.

    Attributes:
        repository: Whose configuration this is.
        pipeline: Class of diffusers.
        denoiser: Name of its component that is called in every step.
        parts: Classes and arguments of diffusers' modules, by component.
        tiny: What is different about them when tiny, by component.
        scheduler: Class and arguments of the noise scheduler.
        encoders: Text encoders: class, configuration class and arguments, by component.
        tiny_encoders: What is different about them when tiny.
        embeddings: Arguments of ``pipe(...)`` in place of prompts: shapes as published.
        tiny_embeddings: The same when tiny.
        arguments: What every request has besides (guidance).
        calls_per_step: Denoiser calls of one step of one request.
        rows: Rows that one request brings to such a call.
        frames: Frames by size, of a video.
        size_tiny: Sizes when tiny that stand for 512 and 1024.
    """

    repository: str
    pipeline: str
    denoiser: str
    parts: dict[str, tuple[str, dict[str, Any]]]
    tiny: dict[str, dict[str, Any]]
    scheduler: tuple[str, dict[str, Any]]
    encoders: dict[str, tuple[str, str, dict[str, Any]]]
    tiny_encoders: dict[str, dict[str, Any]]
    embeddings: dict[str, tuple[int, ...]]
    tiny_embeddings: dict[str, tuple[int, ...]]
    arguments: dict[str, Any]
    calls_per_step: int = 1
    rows: int = 1
    frames: dict[int, int] | None = None
    size_tiny: tuple[int, int] = (32, 64)


_VAE = {
    "block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 2, "latent_channels": 4, "sample_size": 1024,
}  # fmt: skip
_TINY_VAE = {
    "block_out_channels": (8, 16), "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2, "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 32,
}  # fmt: skip
_NO_QUANT = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
_CLIP_L = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "projection_dim": 768, "hidden_act": "quick_gelu",
}  # fmt: skip
_CLIP_G = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "projection_dim": 1280, "hidden_act": "gelu",
}  # fmt: skip
_T5 = {
    "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
_TINY_CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
              "projection_dim": 32}  # fmt: skip
_TINY_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 300}


def _unlike(**shapes: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The same shapes for prompts and negative prompts."""
    return {f"{side}{name}": shape for name, shape in shapes.items() for side in ("", "negative_")}


SDXL = Architecture(
    repository="stabilityai/stable-diffusion-xl-base-1.0",
    pipeline="StableDiffusionXLPipeline", denoiser="unet", rows=2, arguments={"guidance_scale": 5.0},
    parts={
        "unet": ("UNet2DConditionModel", {
            "sample_size": 128, "in_channels": 4, "out_channels": 4, "layers_per_block": 2,
            "block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True, "norm_num_groups": 32,
            "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        }),
        "vae": ("AutoencoderKL", {**_VAE, "scaling_factor": 0.13025, "force_upcast": True}),
    },
    tiny={
        "unet": {
            "sample_size": 16, "block_out_channels": (16, 32), "layers_per_block": 1, "attention_head_dim": (2, 4),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "cross_attention_dim": 64,
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "transformer_layers_per_block": (1, 1),
            "norm_num_groups": 4, "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 32 + 6 * 8,
        },
        "vae": _TINY_VAE,
    },
    scheduler=("EulerDiscreteScheduler", {
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "leading",
        "steps_offset": 1,
    }),
    encoders={"text_encoder": ("CLIPTextModel", "CLIPTextConfig", _CLIP_L),
              "text_encoder_2": ("CLIPTextModelWithProjection", "CLIPTextConfig", _CLIP_G)},
    tiny_encoders={"text_encoder": _TINY_CLIP, "text_encoder_2": _TINY_CLIP},
    embeddings=_unlike(prompt_embeds=(1, 77, 2048), pooled_prompt_embeds=(1, 1280)),
    tiny_embeddings=_unlike(prompt_embeds=(1, 77, 64), pooled_prompt_embeds=(1, 32)),
)  # fmt: skip

SD3 = Architecture(
    repository="stabilityai/stable-diffusion-3.5-medium",
    pipeline="StableDiffusion3Pipeline", denoiser="transformer", rows=2, arguments={"guidance_scale": 4.5},
    parts={
        "transformer": ("SD3Transformer2DModel", {
            "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
            "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096,
            "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm",
        }),
        "vae": ("AutoencoderKL", {**_VAE, **_NO_QUANT, "scaling_factor": 1.5305, "shift_factor": 0.0609}),
    },
    tiny={
        "transformer": {
            "sample_size": 32, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4,
            "joint_attention_dim": 64, "caption_projection_dim": 32, "pooled_projection_dim": 64,
            "pos_embed_max_size": 48, "dual_attention_layers": (0,),
        },
        "vae": _TINY_VAE,
    },
    scheduler=("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    encoders={"text_encoder": ("CLIPTextModelWithProjection", "CLIPTextConfig", _CLIP_L),
              "text_encoder_2": ("CLIPTextModelWithProjection", "CLIPTextConfig", _CLIP_G)},
    tiny_encoders={"text_encoder": _TINY_CLIP, "text_encoder_2": _TINY_CLIP},
    embeddings=_unlike(prompt_embeds=(1, 333, 4096), pooled_prompt_embeds=(1, 2048)),
    tiny_embeddings=_unlike(prompt_embeds=(1, 93, 64), pooled_prompt_embeds=(1, 64)),
)  # fmt: skip

FLUX = Architecture(
    repository="black-forest-labs/FLUX.1-dev",
    pipeline="FluxPipeline", denoiser="transformer", arguments={"guidance_scale": 3.5},
    parts={
        "transformer": ("FluxTransformer2DModel", {
            "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
            "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
            "guidance_embeds": True, "axes_dims_rope": (16, 56, 56),
        }),
        "vae": ("AutoencoderKL", {**_VAE, **_NO_QUANT, "scaling_factor": 0.3611, "shift_factor": 0.1159}),
    },
    tiny={
        "transformer": {
            "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
            "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8),
        },
        "vae": _TINY_VAE,
    },
    scheduler=("FlowMatchEulerDiscreteScheduler", {
        "base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 4096, "max_shift": 1.15, "shift": 3.0,
        "use_dynamic_shifting": True,
    }),
    encoders={"text_encoder": ("CLIPTextModel", "CLIPTextConfig", _CLIP_L),
              "text_encoder_2": ("T5EncoderModel", "T5Config", _T5)},
    tiny_encoders={"text_encoder": _TINY_CLIP, "text_encoder_2": _TINY_T5},
    embeddings={"prompt_embeds": (1, 512, 4096), "pooled_prompt_embeds": (1, 768)},
    tiny_embeddings={"prompt_embeds": (1, 16, 32), "pooled_prompt_embeds": (1, 32)},
)  # fmt: skip

WAN = Architecture(
    repository="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    pipeline="WanPipeline", denoiser="transformer", calls_per_step=2, arguments={"guidance_scale": 5.0},
    frames={512: 17, 1024: 5, 32: 5, 64: 5},
    parts={
        "transformer": ("WanTransformer3DModel", {
            "patch_size": (1, 2, 2), "num_attention_heads": 12, "attention_head_dim": 128, "in_channels": 16,
            "out_channels": 16, "text_dim": 4096, "freq_dim": 256, "ffn_dim": 8960, "num_layers": 30,
            "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024,
        }),
        "vae": ("AutoencoderKLWan", {}),
    },
    tiny={
        "transformer": {
            "num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 32, "freq_dim": 32, "ffn_dim": 32,
            "num_layers": 2, "rope_max_seq_len": 32,
        },
        "vae": {"base_dim": 3, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1},
    },
    scheduler=("UniPCMultistepScheduler", {
        "prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0,
    }),
    encoders={"text_encoder": ("UMT5EncoderModel", "UMT5Config", {**_T5, "vocab_size": 256384})},
    tiny_encoders={"text_encoder": _TINY_T5},
    embeddings=_unlike(prompt_embeds=(1, 512, 4096)),
    tiny_embeddings=_unlike(prompt_embeds=(1, 16, 32)),
)  # fmt: skip

QWEN = Architecture(
    repository="Qwen/Qwen-Image",
    pipeline="QwenImagePipeline", denoiser="transformer", calls_per_step=2, arguments={"true_cfg_scale": 4.0},
    parts={
        "transformer": ("QwenImageTransformer2DModel", {
            "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 60, "attention_head_dim": 128,
            "num_attention_heads": 24, "joint_attention_dim": 3584, "guidance_embeds": False,
            "axes_dims_rope": (16, 56, 56),
        }),
        "vae": ("AutoencoderKLQwenImage", {}),
    },
    tiny={
        "transformer": {
            "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 3,
            "joint_attention_dim": 32, "axes_dims_rope": (8, 4, 4),
        },
        "vae": {"base_dim": 12, "z_dim": 4, "dim_mult": [1, 2, 4], "num_res_blocks": 1,
                "temperal_downsample": [False, True], "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4},
    },
    scheduler=("FlowMatchEulerDiscreteScheduler", {
        "base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 8192, "max_shift": 0.9,
        "use_dynamic_shifting": True, "shift_terminal": 0.02, "time_shift_type": "exponential",
    }),
    encoders={},  # Qwen2.5-VL 7B: its embeddings are given, there is no room for both
    tiny_encoders={},
    embeddings=_unlike(prompt_embeds=(1, 128, 3584), prompt_embeds_mask=(1, 128)),
    tiny_embeddings=_unlike(prompt_embeds=(1, 16, 32), prompt_embeds_mask=(1, 16)),
)  # fmt: skip

ARCHITECTURES = {"sdxl": SDXL, "sd3.5-medium": SD3, "flux-dev": FLUX, "wan-1.3b": WAN, "qwen-image": QWEN}
