"""Arguments that are ids: how many the model has in its tables. On a GPU an id beyond them ends all that runs there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from steploom.weave import signatures

_CLASSES = ("class_labels",)
_TOKENS = ("input_ids", "mask_token_id")
"""Arguments that a language model is given; others (``eos_token_id``) are only compared."""


def told(pipeline: Any, denoiser: Any) -> dict[str, int]:
    """How many ids there are for each argument that is one, or several; nothing of those that nobody knows of."""
    accepted = signatures.call_parameters(pipeline).keys()
    found = {name: table for name in _CLASSES if name in accepted for table in _class_tables(denoiser)}
    found |= {name: table for name in _TOKENS if name in accepted for table in _token_tables(denoiser)}
    return {name: table.num_embeddings for name, table in found.items()}


def _class_tables(denoiser: Any) -> Iterator[nn.Embedding]:
    """Of labels: a U-Net's own, or that of diffusers' ``LabelEmbedding`` in a transformer's blocks."""
    table = getattr(denoiser, "class_embedding", None)
    parts = denoiser.modules() if isinstance(denoiser, nn.Module) else ()
    inner = (part.embedding_table for part in parts if type(part).__name__ == "LabelEmbedding")
    yield from (one for one in (table, *inner) if isinstance(one, nn.Embedding))


def _token_tables(denoiser: Any) -> Iterator[nn.Embedding]:
    asked = getattr(denoiser, "get_input_embeddings", None)
    table = None if asked is None else asked()
    if isinstance(table, nn.Embedding):
        yield table
