"""``usage`` in answers: OpenAI counts tokens, so something has to be counted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from steploom.server.fields import ImageFields

_WORDS = re.compile(r"\w+|[^\w\s]")
PATCH = 16
"""A token of an image is a square of so many pixels a side."""


def usage_of(fields: ImageFields, sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Tokens of one answer: words and punctuation marks of the prompts, and squares of 16x16 pixels of the images."""
    texts = (fields.prompt, str(fields.params.get("negative_prompt") or ""))
    words = sum(len(_WORDS.findall(text)) for text in texts)
    made = sum(_patches(*size) for size in sizes)
    given = sum(_patches(*size) for size in sizes[:1]) * len(fields.images)
    return {
        "input_tokens": words + given,
        "input_tokens_details": {"text_tokens": words, "image_tokens": given},
        "output_tokens": made,
        "output_tokens_details": {"text_tokens": 0, "image_tokens": made},
        "total_tokens": words + given + made,
    }


def _patches(width: int, height: int) -> int:
    return -(-width // PATCH) * -(-height // PATCH)
