"""The untrained parts of the demo model, all of stock classes, and the one trick that makes training them cheap."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable

import torch
import wording
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.models.attention_processor import Attention
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from tokenizers.processors import RobertaProcessing, TemplateProcessing
from torch import nn
from torch._inductor import list_options
from torch.nn import functional
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from steploom.demo import scene

Velocity = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

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

        def heads(stream: torch.Tensor, *layers: nn.Linear) -> tuple[torch.Tensor, ...]:
            weight = torch.cat([layer.weight for layer in layers])
            bias = torch.cat([layer.bias for layer in layers])
            return functional.linear(stream, weight, bias).unflatten(2, (len(layers), attn.heads, -1)).unbind(2)

        query, key, value = heads(hidden_states, attn.to_q, attn.to_k, attn.to_v)
        more = heads(encoder_hidden_states, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        query = torch.cat([attn.norm_q(query), attn.norm_added_q(more[0])], dim=1).transpose(1, 2)
        key = torch.cat([attn.norm_k(key), attn.norm_added_k(more[1])], dim=1).transpose(1, 2)
        value = torch.cat([value, more[2]], dim=1).transpose(1, 2)
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


def compiler_is_there() -> bool:
    """Whether there is the C++ compiler that ``torch.compile`` needs: g++, or what CXX names."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def compiled(function: Velocity) -> Velocity:
    """Compile ``function`` for one shape, or return it as it is where there is no C++ compiler."""
    if not compiler_is_there():
        return function
    quick = "cpp.use_decompose_tanh"  # the GELUs' tanh from one exponential; new in torch 2.7
    return torch.compile(function, dynamic=False, options={quick: True} if quick in list_options() else {})


class Trained(nn.Module):
    """The jointly trained parts: two text encoders and the denoiser."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        self.text_encoder = build_text_encoder(tokenizer)
        self.text_encoder_2 = build_text_encoder(tokenizer)
        self.transformer = build_transformer()
        self._compiled = compiled(self._velocity)

    def forward(
        self, latents: torch.Tensor, sigmas: torch.Tensor, ids: torch.Tensor, log_count: torch.Tensor
    ) -> torch.Tensor:
        """Return the velocity (n, 8, h, w) at noise levels (n,) in 0..1 under token ids (n, TEXT_TOKENS)."""
        common = latents.shape[-1] == COMPILED_SIDE
        return (self._compiled if common else self._velocity)(latents, sigmas, ids, log_count)

    def _velocity(
        self, latents: torch.Tensor, sigmas: torch.Tensor, ids: torch.Tensor, log_count: torch.Tensor
    ) -> torch.Tensor:
        contexts, pooled = zip(*(read(one, ids) for one in (self.text_encoder, self.text_encoder_2)), strict=True)
        return self.transformer(
            latents,
            encoder_hidden_states=functional.pad(torch.cat(contexts, dim=-1), (0, 0, 0, 1)),
            pooled_projections=torch.cat(pooled, dim=-1),
            timestep=sigmas * 1000,
            joint_attention_kwargs={"log_count": log_count},
            return_dict=False,
        )[0]


def read(encoder: CLIPTextModelWithProjection, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the pipeline takes from a text encoder: the last layer's input (n, tokens, width), ``text_embeds``.

    It runs the encoder's own layers in turn, without the hooks by which its ``forward`` collects hidden states.
    """
    model = encoder.text_model
    hidden = before = model.embeddings(input_ids=ids)
    for layer in model.encoder.layers:
        before = hidden
        hidden = layer(hidden, None, is_causal=True)
    ends = (ids == model.eos_token_id).int().argmax(dim=-1)
    pooled = model.final_layer_norm(hidden)[torch.arange(len(ids)), ends]
    return before, encoder.text_projection(pooled)
