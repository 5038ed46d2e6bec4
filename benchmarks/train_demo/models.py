"""The untrained parts of the demo model, all of stock classes, and the one trick that makes training them cheap."""

from __future__ import annotations

import math

import torch
import wording
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.models.attention_processor import Attention
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from tokenizers.processors import RobertaProcessing, TemplateProcessing
from torch import nn
from torch.nn import functional
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from steploom.demo import scene

TEXT_TOKENS = 20  # the longest prompt of the grammar has 18, its two end marks included
TEXT_WIDTH = 64
LATENT_CHANNELS = 8
COMPILED_SIDE = 16  # latents of this side, those of nine pictures in ten, go through torch.compile: a quarter faster
START, END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer for which every word of the grammar is one token; other words are put into these or left out.

    It reads the grammar as a CLIP tokenizer of this vocabulary does, but of that class only the vocabulary would be
    loaded, and not the normalizer.
    """
    symbols = _byte_symbols()
    pieces = symbols + [symbol + "</w>" for symbol in symbols]
    merges: list[tuple[str, str]] = []
    for word in scene.vocabulary():
        while len(parts := _apply([*word[:-1], word[-1] + "</w>"], merges)) > 1:
            merges.append((parts[0], parts[1]))
            pieces.append(parts[0] + parts[1])
    vocab = {piece: place for place, piece in enumerate(dict.fromkeys([*pieces, START, END]))}
    whole = Tokenizer(BPE(vocab=vocab, merges=merges, end_of_word_suffix="</w>", unk_token=END))
    whole.normalizer = wording.normalizer()
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    whole.post_processor = RobertaProcessing((END, vocab[END]), (START, vocab[START]), add_prefix_space=False)
    whole.decoder = decoders.BPEDecoder(suffix="</w>")
    marks = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    return PreTrainedTokenizerFast(tokenizer_object=whole, model_max_length=TEXT_TOKENS, **marks)


def _apply(parts: list[str], merges: list[tuple[str, str]]) -> list[str]:
    for left, right in merges:
        place = 0
        while place + 1 < len(parts):
            if (parts[place], parts[place + 1]) == (left, right):
                parts[place : place + 2] = [left + right]
            place += 1
    return parts


def _byte_symbols() -> list[str]:
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    extra = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) for byte in plain] + [chr(256 + place) for place in range(len(extra))]


def build_text_encoder(tokenizer: PreTrainedTokenizerFast) -> CLIPTextModelWithProjection:
    """Return an untrained text encoder for ``tokenizer``."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=TEXT_TOKENS,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return CLIPTextModelWithProjection(config)


def build_silent_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that reads any text as one unknown token and an end mark."""
    plain = Tokenizer(WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    plain.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    marks = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=plain, model_max_length=512, **marks)


def build_silent_encoder() -> T5EncoderModel:
    """Return a third text encoder whose every output is exactly zero.

    The stock pipeline refuses to load from a folder without a third text encoder, and puts zeros in its place if told
    that there is none. This one gives the same zeros.
    """
    config = T5Config(
        vocab_size=3,
        d_model=2 * TEXT_WIDTH,
        d_kv=8,
        d_ff=8,
        num_layers=1,
        num_heads=1,
        pad_token_id=0,
        eos_token_id=1,
        dtype="float32",
    )
    model = T5EncoderModel(config)
    for value in model.parameters():
        nn.init.zeros_(value)
    return model


def build_transformer() -> SD3Transformer2DModel:
    """Return an untrained denoiser whose every layer starts as the identity."""
    model = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=5,
        num_attention_heads=4,
        attention_head_dim=32,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=128,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=12,
        qk_norm="rms_norm",
    )
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and (name.endswith(("norm1.linear", "norm1_context.linear"))):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    for layer in (model.norm_out.linear, model.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Return the scheduler of the finished pipeline."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=2.0)


class OneZeroToken:
    """Joint attention in which the last text token stands for many equal ones.

    Without a third text encoder the stock pipeline appends ``max_sequence_length`` zero vectors to the text. They
    carry no position, so they stay equal through every layer: n of them weigh exactly as one whose attention logit
    is raised by log n.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        log_count: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend from both streams to both; ``log_count`` (1, 1, 1, tokens) is added to all logits."""

        def heads(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.unflatten(2, (attn.heads, -1)).transpose(1, 2)

        query = attn.norm_q(heads(attn.to_q(hidden_states)))
        key = attn.norm_k(heads(attn.to_k(hidden_states)))
        query = torch.cat([query, attn.norm_added_q(heads(attn.add_q_proj(encoder_hidden_states)))], dim=2)
        key = torch.cat([key, attn.norm_added_k(heads(attn.add_k_proj(encoder_hidden_states)))], dim=2)
        value = torch.cat([heads(attn.to_v(hidden_states)), heads(attn.add_v_proj(encoder_hidden_states))], dim=2)
        out = functional.scaled_dot_product_attention(query, key, value, attn_mask=log_count)
        image, text = out.transpose(1, 2).flatten(2).split([hidden_states.shape[1], encoder_hidden_states.shape[1]], 1)
        if not attn.context_pre_only:
            text = attn.to_add_out(text)
        return attn.to_out[0](image), text


def zero_token_bias(image_tokens: int, count: int) -> torch.Tensor:
    """Return the logit bias (1, 1, 1, tokens) under which the last token stands for ``count``."""
    bias = torch.zeros(1, 1, 1, image_tokens + TEXT_TOKENS + 1)
    bias[..., -1] = math.log(count)
    return bias


class Trained(nn.Module):
    """The jointly trained parts: two text encoders and the denoiser."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        self.text_encoder = build_text_encoder(tokenizer)
        self.text_encoder_2 = build_text_encoder(tokenizer)
        self.transformer = build_transformer()
        self._compiled = torch.compile(self.transformer.forward, dynamic=False)

    def forward(
        self, latents: torch.Tensor, sigmas: torch.Tensor, ids: torch.Tensor, log_count: torch.Tensor
    ) -> torch.Tensor:
        """Return the velocity (n, 8, h, w) at noise levels (n,) in 0..1 under token ids (n, TEXT_TOKENS)."""
        outs = [one(ids, output_hidden_states=True) for one in (self.text_encoder, self.text_encoder_2)]
        context = torch.cat([out.hidden_states[-2] for out in outs], dim=-1)
        pooled = torch.cat([out.text_embeds for out in outs], dim=-1)
        common = latents.shape[-1] == COMPILED_SIDE
        return (self._compiled if common else self.transformer)(
            latents,
            encoder_hidden_states=functional.pad(context, (0, 0, 0, 1)),
            pooled_projections=pooled,
            timestep=sigmas * 1000,
            joint_attention_kwargs={"log_count": log_count},
            return_dict=False,
        )[0]
