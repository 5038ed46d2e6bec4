"""Rules of families: which arguments of a denoiser are ragged, or come in one row for all, and what masks them.

The one place for per-family rules, declarative: families whose prompt embeddings have the prompt's own length merge
through padding with a mask. For diffusion language models see :mod:`steploom.weave.ragged.language`. A rule pads only
calls whose lengths differ, and its merges are verified like all others.
"""

from __future__ import annotations

from steploom.weave.ragged.language import LanguageRule, RaggedCache, RaggedSequence
from steploom.weave.ragged.text import OneForAll, RaggedFrames, RaggedLayers, RaggedText

Rule = RaggedText | OneForAll

RULES: dict[str, Rule] = {
    # transformer_qwenimage.py: rotary positions of text start after the image's, whatever the text's length.
    "QwenImageTransformer2DModel": RaggedText("encoder_hidden_states", "encoder_hidden_states_mask"),
    # attention_processor.py masks text as diffusers' attention masks do: padded keys get no weight.
    "AudioLDM2UNet2DConditionModel": RaggedText("encoder_hidden_states_1", "encoder_attention_mask_1"),
    "BriaFiboTransformer2DModel": RaggedLayers("encoder_hidden_states", "attention_mask"),
    # pipeline_consisid.py has one face for both branches of guidance; the features of each row's own are read.
    "ConsisIDTransformer3DModel": OneForAll(("id_cond", "id_vit_hidden")),
    "DreamLiteUNetModel": RaggedText("encoder_hidden_states", "encoder_attention_mask"),
    "ErnieImageTransformer2DModel": RaggedText("text_bth", None),
    # transformer_glm_image.py shows the keys and values of one sample's pictures to all rows.
    "GlmImageTransformer2DModel": OneForAll(("kv_caches",)),
    "LatteTransformer3DModel": RaggedFrames("encoder_hidden_states", "encoder_attention_mask"),
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


def rule_for(module: object) -> Rule | None:
    """The rule of a denoiser's class, if it has one."""
    return RULES.get(type(module).__name__)


def language_rules(pipeline: object) -> dict[str, LanguageRule]:
    """The rules of a pipeline's components by name; those of its base class, if it derives from one that has some."""
    return next(
        (LANGUAGE_RULES[base.__name__] for base in type(pipeline).__mro__ if base.__name__ in LANGUAGE_RULES), {}
    )
