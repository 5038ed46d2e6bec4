"""In which order modules run within a tick, learned from the programs: ControlNet before transformer."""

from __future__ import annotations

import functools

_ENCODERS = ("text_encoder", "image_encoder", "vision", "language", "tokenizer", "feature", "prompt", "safety",
             "depth", "adapter", "text_proj", "projection")  # fmt: skip
_DECODERS = ("vae", "vqvae", "vqgan", "movq", "vocoder", "autoencoder", "latent_upsampler")


@functools.cache
def is_denoiser(name: str) -> bool:
    """Whether a component evaluates steps (transformer, unet, prior, controlnet), by its name in diffusers."""
    own = name.rpartition(".")[2]
    return not own.startswith(_ENCODERS + _DECODERS) and "encoder" not in own


class CallOrder:
    """Which module calls can still lead to which within a tick.

    A module runs only when no scheduled program waits at another one that can still lead to it: running whatever is
    pending would halve the sharing. The order decides how much is shared, never what comes out.
    """

    def __init__(self) -> None:
        self._next: dict[str, set[str]] = {}
        self._seen: dict[str, int] = {}

    def saw(self, before: str | None, after: str) -> None:
        """A program called ``after``, and ``before`` earlier in the same tick."""
        self._seen.setdefault(after, len(self._seen))
        if before is not None and before != after:
            self._next.setdefault(before, set()).add(after)

    def first(self, pending: set[str]) -> str:
        """The module to run now: one that no other pending one leads to."""
        if len(pending) == 1:
            return next(iter(pending))
        ranked = sorted(pending, key=lambda name: (name.rpartition(".")[2].startswith(_DECODERS), self._seen[name]))
        for name in ranked:
            if not any(self._leads(other, name) for other in pending if other != name):
                return name
        return ranked[0]

    def _leads(self, start: str, goal: str) -> bool:
        open_, closed = [start], {start}
        while open_:
            for name in self._next.get(open_.pop(), ()):
                if name == goal:
                    return True
                if name not in closed:
                    closed.add(name)
                    open_.append(name)
        return False
