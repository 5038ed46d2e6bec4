"""Ragged text: families whose prompt embeddings have the prompt's own length merge through padding with a mask.

The one place for per-family rules, declarative: which argument is ragged, along which axis, and which argument masks
it; for diffusion language models see :mod:`steploom.weave.ragged_language`. A rule pads only calls whose lengths
differ, and its merges are verified like all others.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from steploom.weave.ragged_language import LanguageRule, RaggedCache, RaggedSequence


@dataclasses.dataclass(frozen=True)
class RaggedText:
    """How a denoiser's text argument is padded.

    Attributes:
        text: Keyword argument ``[rows, length, channels]``.
        mask: Keyword argument ``[rows, length]``, True for real tokens; made if it is None. None where the denoiser is
            told lengths by another argument.
    """

    text: str
    mask: str | None

    def taken_apart(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The arguments of such calls are tensors already."""

    def padded(self, text: torch.Tensor, mask: torch.Tensor | None, length: int) -> dict[str, torch.Tensor]:
        """``text`` and its mask by name, zero-padded to ``length`` tokens."""
        missing = length - text.shape[1]
        changes = {self.text: torch.nn.functional.pad(text, (0, 0, 0, missing))}
        if self.mask is None:
            return changes
        if mask is None:
            mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        return changes | {self.mask: torch.nn.functional.pad(mask.to(torch.bool), (0, missing))}


RULES = {
    # transformer_qwenimage.py: rotary positions of text start after the image's, whatever the text's length.
    "QwenImageTransformer2DModel": RaggedText("encoder_hidden_states", "encoder_hidden_states_mask"),
    # attention_processor.py masks text as diffusers' attention masks do: padded keys get no weight.
    "AudioLDM2UNet2DConditionModel": RaggedText("encoder_hidden_states_1", "encoder_attention_mask_1"),
    "DreamLiteUNetModel": RaggedText("encoder_hidden_states", "encoder_attention_mask"),
    "ErnieImageTransformer2DModel": RaggedText("text_bth", None),
    "LuminaNextDiT2DModel": RaggedText("encoder_hidden_states", "encoder_mask"),
    "NucleusMoEImageTransformer2DModel": RaggedText("encoder_hidden_states", "encoder_hidden_states_mask"),
    "QwenImageControlNetModel": RaggedText("encoder_hidden_states", "encoder_hidden_states_mask"),
}


LANGUAGE_RULES: dict[str, dict[str, LanguageRule]] = {
    # pipeline_llada2.py reads only the logits of the block that ends where the call does; a mask hides what follows.
    "LLaDA2Pipeline": {"model": RaggedSequence()},
    # modeling_diffusion_gemma.py: the decoder appends the canvas to the encoder's cache, whose keys know their places.
    "DiffusionGemmaPipeline": {"model": RaggedCache()},
}
"""By pipeline and component: any model of the right interface will do, which may be code from the hub."""


def rule_for(module: object) -> RaggedText | None:
    """The rule of a denoiser's class, if it has one."""
    return RULES.get(type(module).__name__)


def language_rules(pipeline: object) -> dict[str, LanguageRule]:
    """The rules of a pipeline's components by name; those of its base class, if it derives from one that has some."""
    return next(
        (LANGUAGE_RULES[base.__name__] for base in type(pipeline).__mro__ if base.__name__ in LANGUAGE_RULES), {}
    )
