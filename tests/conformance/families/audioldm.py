"""AudioLDM 2 and MusicLDM: U-Nets over spectrograms, conditioned on CLAP."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from conformance.case import PROMPTS, case
from conformance.parts_cascade import ddim, unet
from diffusers import (
    AudioLDM2Pipeline,
    AudioLDM2ProjectionModel,
    AudioLDM2UNet2DConditionModel,
    MusicLDMPipeline,
)
from tokenizers import pre_tokenizers
from transformers import (
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaTokenizer,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
    T5Tokenizer,
)

WIDTH = 16
MELS = 8


def _inputs(i: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[i], "guidance_scale": 3.0 + i, "audio_length_in_s": 0.004, "max_new_tokens": 2}


def _embedded_inputs(i: int) -> dict[str, Any]:
    embeds = torch.randn(2, 1, WIDTH, generator=torch.Generator().manual_seed(i)).unbind()
    return {
        "prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1], "guidance_scale": 3.0 + i,
        "audio_length_in_s": 0.004,
    }  # fmt: skip


def _clap() -> Any:
    text = {
        "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2,
        "vocab_size": tiny.VOCABULARY, "projection_dim": WIDTH, "max_position_embeddings": 80, "pad_token_id": 0,
    }  # fmt: skip
    audio = {
        "spec_size": 8, "window_size": 4, "num_mel_bins": MELS, "patch_size": 2, "patch_stride": 2, "depths": [1, 1],
        "num_attention_heads": [1, 2], "hidden_size": 16, "patch_embeds_hidden_size": 8, "projection_dim": WIDTH,
        "num_hidden_layers": 2,
    }  # fmt: skip
    return tiny.scaled(ClapModel(ClapConfig(text_config=text, audio_config=audio, projection_dim=WIDTH)), 1.2, 3)


def _sound_parts() -> dict[str, Any]:
    vocoder = SpeechT5HifiGanConfig(
        model_in_dim=MELS, upsample_initial_channel=8, upsample_rates=[2, 2], upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1]], normalize_before=False,
    )  # fmt: skip
    return {
        "vae": tiny.vae(in_channels=1, out_channels=1), "vocoder": tiny.scaled(SpeechT5HifiGan(vocoder), 1.0, 6),
        "text_encoder": _clap(), "feature_extractor": ClapFeatureExtractor(feature_size=MELS), "scheduler": ddim(),
    }  # fmt: skip


def _roberta_tokenizer() -> Any:
    vocabulary = {"<s>": 1, "<pad>": 0, "</s>": 2, "<unk>": 3, "<mask>": 4}
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[: tiny.VOCABULARY - 5]
    vocabulary |= {letter: i + 5 for i, letter in enumerate(letters)}
    return RobertaTokenizer(vocab=vocabulary, merges=[], model_max_length=16)


def _t5_tokenizer() -> Any:
    letters = "▁abcdefghijklmnopqrstuvwxyz"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -1.0) for letter in letters)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=16)


@case("AudioLDM2Pipeline", "AudioLDM 2", "text to audio", _inputs)
def second() -> Any:
    denoiser = AudioLDM2UNet2DConditionModel(
        block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, sample_size=8, in_channels=4,
        out_channels=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=((None, 16, 32),) * 2,
        attention_head_dim=4,
    )  # fmt: skip
    language = GPT2Config(n_embd=16, n_head=2, n_layer=2, n_positions=80, vocab_size=tiny.VOCABULARY)
    return AudioLDM2Pipeline(
        unet=tiny.scaled(denoiser, 1.2), text_encoder_2=tiny.t5(32), tokenizer=_roberta_tokenizer(),
        tokenizer_2=_t5_tokenizer(), language_model=tiny.scaled(GPT2LMHeadModel(language), 1.2, 4),
        projection_model=tiny.scaled(AudioLDM2ProjectionModel(WIDTH, 32, 16), 1.2), **_sound_parts(),
    )  # fmt: skip


@case("MusicLDMPipeline", "MusicLDM", "embeddings to audio", _embedded_inputs)
def music() -> Any:
    """From embeddings: this pipeline does not know the outputs that CLAP has in transformers 5."""
    denoiser = unet(
        cross_attention_dim=(16, 32), class_embed_type="simple_projection", class_embeddings_concat=True,
        projection_class_embeddings_input_dim=WIDTH,
    )  # fmt: skip
    return MusicLDMPipeline(unet=denoiser, tokenizer=tiny.tokenizer(), **_sound_parts())
