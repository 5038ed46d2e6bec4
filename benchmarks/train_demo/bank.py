"""Second stage: draw the training scenes once and keep their latents and what they show."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import torch
from common import draw_batch, load_if_there, log, save_atomically, to_tensor
from diffusers import AutoencoderKL
from torch.nn import functional

from steploom.demo import scene

COUNTS = {64: 49152, 32: 2048, 48: 2048, 96: 1536}
CHUNK = 64
AT_ONCE = 16  # pictures encoded together: what they need fits the cache


@dataclasses.dataclass
class Bank:
    """Scenes, their latents and where their shapes are, by picture side in pixels.

    Latents are float16 (n, 8, side / 4, side / 4); ``shapes`` is bool (n, side / 4, side / 4).
    """

    scenes: dict[int, list[scene.Scene]]
    latents: dict[int, torch.Tensor]
    shapes: dict[int, torch.Tensor]
    _weights: dict[tuple[int, bool], np.ndarray] = dataclasses.field(default_factory=dict)

    def batch(
        self, rng: np.random.Generator, pixels: int, count: int, *, lean: bool = False
    ) -> tuple[list[scene.Scene], torch.Tensor, torch.Tensor]:
        """Pick ``count`` scenes, the hard ones more often, or much more often (``lean``).

        Return them with their latents, float32, and shapes.
        """
        scenes = self.scenes[pixels]
        if (pixels, lean) not in self._weights:
            self._weights[pixels, lean] = np.cumsum([hardness(one, lean=lean) for one in scenes])
        weights = self._weights[pixels, lean]
        places = np.searchsorted(weights, rng.random(count) * weights[-1], side="right")
        at = torch.from_numpy(places)
        return [scenes[place] for place in places], self.latents[pixels][at].float(), self.shapes[pixels][at]


def hardness(one: scene.Scene, *, lean: bool) -> float:
    """How often to show a scene, beside others: what is drawn worst is stars and rings, small ones and on black."""
    thin = [item for item in one.items if item.shape in ("star", "ring")]
    small = sum(item.size == "small" for item in thin) if lean else 0
    return 1.0 + (3.0 if lean else 0.5) * len(thin) + 2.0 * small + (4.0 if thin and one.background == "black" else 0.0)


def where_shapes_are(pictures: torch.Tensor) -> torch.Tensor:
    """Return which latents (n, h / 4, w / 4) show some of a shape, or lie beside one, of pictures (n, 3, h, w)."""
    behind = pictures[:, :, :1, :1]  # no shape reaches a corner
    away = (pictures - behind).abs().amax(dim=1, keepdim=True) > 0.1
    return functional.max_pool2d(functional.max_pool2d(away.float(), 4), 3, stride=1, padding=1)[:, 0] > 0


@torch.no_grad()
def build(folder: pathlib.Path, vae: AutoencoderKL, shift: float, factor: float) -> Bank:
    """Read the bank from ``bank.pt`` in ``folder``, drawing and encoding what is missing of it."""
    bank = Bank(**(load_if_there(folder / "bank.pt") or {"scenes": {}, "latents": {}, "shapes": {}}))
    for pixels, count in COUNTS.items():
        scenes = bank.scenes.setdefault(pixels, [])
        if len(scenes) >= count:
            continue
        parts = [bank.latents[pixels]] if scenes else []
        shapes = [bank.shapes[pixels]] if scenes else []
        for chunk in range(len(scenes) // CHUNK, count // CHUNK):
            drawn, pictures = draw_batch(np.random.default_rng((2, pixels, chunk)), CHUNK, pixels)
            target = to_tensor(pictures).contiguous(memory_format=torch.channels_last)
            means = [vae.encode(part).latent_dist.mean for part in target.split(AT_ONCE)]
            latents = (torch.cat(means) - shift) * factor
            scenes += drawn
            shapes.append(where_shapes_are(target))
            parts.append(latents.half().contiguous())
        bank.latents[pixels], bank.shapes[pixels] = torch.cat(parts), torch.cat(shapes)
        log(folder, f"bank: {count} scenes of {pixels} pixels, latent std {bank.latents[pixels].float().std():.3f}")
        save_atomically({"scenes": bank.scenes, "latents": bank.latents, "shapes": bank.shapes}, folder / "bank.pt")
    return bank
