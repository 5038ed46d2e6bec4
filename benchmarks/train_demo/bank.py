"""Second stage: draw the training scenes once and keep their latents and what they show."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import torch
from common import draw_batch, load_if_there, log, save_atomically, to_tensor
from diffusers import AutoencoderKL

from steploom.demo import scene

COUNTS = {64: 49152, 32: 2048, 48: 2048, 96: 1536}
CHUNK = 64


@dataclasses.dataclass
class Bank:
    """Scenes and their latents by picture side in pixels; latents are float16 (n, 8, side / 4, side / 4)."""

    scenes: dict[int, list[scene.Scene]]
    latents: dict[int, torch.Tensor]
    _weights: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)

    def batch(
        self, rng: np.random.Generator, pixels: int, count: int, *, lean: bool = False
    ) -> tuple[list[scene.Scene], torch.Tensor]:
        """Pick ``count`` scenes at random; return them with their latents, float32. ``lean``: to the hard ones."""
        scenes = self.scenes[pixels]
        if lean:
            if pixels not in self._weights:
                self._weights[pixels] = np.cumsum([hardness(one) for one in scenes])
            weights = self._weights[pixels]
            places = np.searchsorted(weights, rng.random(count) * weights[-1], side="right")
        else:
            places = rng.integers(0, len(scenes), count)
        return [scenes[place] for place in places], self.latents[pixels][torch.from_numpy(places)].float()


def hardness(one: scene.Scene) -> float:
    """How often to show a scene, beside others: what was drawn worst of all were thin shapes, on black above all."""
    thin = sum(item.shape in ("star", "ring") for item in one.items)
    return 1.0 + thin + (2.0 if one.background == "black" else 0.0)


@torch.no_grad()
def build(folder: pathlib.Path, vae: AutoencoderKL, shift: float, factor: float) -> Bank:
    """Read the bank from ``bank.pt`` in ``folder``, drawing and encoding what is missing of it."""
    bank = Bank(**(load_if_there(folder / "bank.pt") or {"scenes": {}, "latents": {}}))
    for pixels, count in COUNTS.items():
        scenes = bank.scenes.setdefault(pixels, [])
        if len(scenes) >= count:
            continue
        parts = [bank.latents[pixels]] if scenes else []
        for chunk in range(len(scenes) // CHUNK, count // CHUNK):
            drawn, pictures = draw_batch(np.random.default_rng((2, pixels, chunk)), CHUNK, pixels)
            target = to_tensor(pictures).contiguous(memory_format=torch.channels_last)
            latents = (vae.encode(target).latent_dist.mean - shift) * factor
            scenes += drawn
            parts.append(latents.half().contiguous())
        bank.latents[pixels] = torch.cat(parts)
        log(folder, f"bank: {count} scenes of {pixels} pixels, latent std {bank.latents[pixels].float().std():.3f}")
        save_atomically({"scenes": bank.scenes, "latents": bank.latents}, folder / "bank.pt")
    return bank
