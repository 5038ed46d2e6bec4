"""Ragged text: families whose prompt embeddings have the prompt's own length merge through padding with a mask.

The one place for per-family rules, declarative: which argument is ragged, along which axis, and which argument masks
it. A rule is used only for calls whose lengths differ, and its merges are verified like all others.
"""

from __future__ import annotations

import dataclasses

import torch


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


def rule_for(module: object) -> RaggedText | None:
    """The rule of a denoiser's class, if it has one."""
    return RULES.get(type(module).__name__)
