"""Why calls ran alone, in a fixed vocabulary: what workers say holds numbers, class names and a module's own words."""

from __future__ import annotations

REASONS = {
    "nothing alike to share with": "unlike",
    "an argument is an object of its own": "own_object",
    "no argument grows": "no_batch_axis",
    "the call changes its structure": "no_batch_axis",
    "the calls could not be put together": "not_joinable",
    "a merged call failed": "merged_call_failed",
    "the merged call raised": "merged_call_failed",
    "merged differs from alone": "verification_failed",
    "rows depend on their mates": "verification_failed",
    "the bits of a row depend on its place": "verification_failed",
    "an adapter reaches rows": "verification_failed",
    "the check raised": "verification_failed",
    "verification failed": "verification_failed",
    "generate() of a language model": "own_loop",
    "gradients were enabled": "pipeline_mode",
    "the pipeline runs": "pipeline_mode",
    "called outside of a program": "pipeline_mode",
    "the pipeline has put a hook": "hooked",
}
"""How a worker's reason begins, and what it is called in labels."""

OTHER = "other"
VOCABULARY = (*dict.fromkeys(REASONS.values()), OTHER)
"""All that a label may say."""


def fold(reason: str) -> str:
    """The word for a worker's reason; ``"other"`` for one that is not known here."""
    return next((word for begin, word in REASONS.items() if reason.startswith(begin)), OTHER)
