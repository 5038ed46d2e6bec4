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
        mask: Keyword argument ``[rows, length]``, True for real tokens; made if it is None.
    """

    text: str
    mask: str

    def padded(self, text: torch.Tensor, mask: torch.Tensor | None, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``text`` and its mask, zero-padded to ``length`` tokens."""
        if mask is None:
            mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        missing = length - text.shape[1]
        return (
            torch.nn.functional.pad(text, (0, 0, 0, missing)),
            torch.nn.functional.pad(mask.to(torch.bool), (0, missing)),
        )


RULES = {
    # transformer_qwenimage.py: rotary positions of text start after the image's, whatever the text's length.
    "QwenImageTransformer2DModel": RaggedText("encoder_hidden_states", "encoder_hidden_states_mask"),
}


def rule_for(module: object) -> RaggedText | None:
    """The rule of a denoiser's class, if it has one."""
    return RULES.get(type(module).__name__)
