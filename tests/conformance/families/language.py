"""Diffusion language models: LLaDA 2 and DiffusionGemma refine a block of tokens at a time."""

from __future__ import annotations

from typing import Any

import tiny_language
from conformance.case import PROMPTS, case
from diffusers import BlockRefinementScheduler, DiscreteDDIMScheduler, EntropyBoundScheduler

_GREEDY = ("seed",)
"""Without temperature nothing is drawn at random."""


def _llada(i: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[i], "gen_length": (16, 24, 12)[i], "block_length": 8, "output_type": "text"}


def _llada_sampled(i: int) -> dict[str, Any]:
    return _llada(i) | {"temperature": 1.0, "threshold": 0.3, "editing_threshold": 0.4, "max_post_steps": 2}


def _gemma(i: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[i], "gen_length": (16, 16, 8)[i], "output_type": "text"}


def _gemma_sampled(i: int) -> dict[str, Any]:
    return _gemma(i) | {"temperature": 1.0}


@case("LLaDA2Pipeline", "LLaDA 2", "text", _llada, indifferent=_GREEDY)
def llada() -> Any:
    return tiny_language.llada()


@case("LLaDA2Pipeline", "LLaDA 2", "text", _llada_sampled, variant="sampled")
def llada_sampled() -> Any:
    return tiny_language.llada()


@case("DiffusionGemmaPipeline", "DiffusionGemma", "text", _gemma)
def gemma() -> Any:
    return tiny_language.gemma(BlockRefinementScheduler())


@case("DiffusionGemmaPipeline", "DiffusionGemma", "text", _gemma_sampled, variant="sampled")
def gemma_sampled() -> Any:
    return tiny_language.gemma(DiscreteDDIMScheduler())


@case("DiffusionGemmaPipeline", "DiffusionGemma", "text", _gemma, variant="entropy")
def gemma_entropy() -> Any:
    return tiny_language.gemma(EntropyBoundScheduler())
