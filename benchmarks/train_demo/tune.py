"""Fourth stage: teach the decoder to draw from the latents that the denoiser leaves, rougher than the encoder's.

The encoder, and with it the space of latents, stays as it is. Fresh scenes are encoded, noised up to ``MOST_NOISE`` and
denoised again as the pipeline does it (SDEdit, Meng and others, 2022): they show the same scene with the denoiser's own
small errors, and the decoder learns to draw the scene all the same.
"""

from __future__ import annotations

import math
import pathlib

import numpy as np
import torch
from common import Clock, draw_batch, load_if_there, log, save_atomically, to_tensor
from diffusers import AutoencoderKL
from models import TEXT_TOKENS, OneZeroToken, Trained, build_tokenizer, zero_token_bias
from optim import Muon
from vae import show

from steploom.demo import scene

BATCH = 12
PEAK_RATE = 1.5e-3
WARM_UP = 30
MOST_NOISE = 0.4  # above it the denoiser moves a shape's place, and the true picture is no longer the right answer
ROUNDS = 3
GUIDANCE = 5.0
ZERO_TOKENS = 16
EVERY = 100  # steps between checkpoints


class Roughener:
    """The trained denoiser, noising latents a little and denoising them again."""

    def __init__(self, averages: dict[str, torch.Tensor]) -> None:
        self.tokenizer = build_tokenizer()
        self.model = Trained(self.tokenizer)
        self.model.transformer.set_attn_processor(OneZeroToken())  # type: ignore[arg-type]
        self.model.load_state_dict(averages)
        self.model.eval()

    @torch.no_grad()
    def __call__(self, clean: torch.Tensor, scenes: list[scene.Scene], generator: torch.Generator) -> torch.Tensor:
        """Return latents (n, 8, h, w) of the same scenes with the denoiser's errors; one in four stays as it is."""
        count = len(scenes)
        levels = MOST_NOISE * torch.rand(count, generator=generator)
        levels = torch.where(torch.rand(count, generator=generator) < 0.25, torch.zeros(count), levels)
        noise = torch.randn(clean.shape, generator=generator)
        latents = torch.lerp(clean, noise, levels[:, None, None, None])
        texts = [scene.prompt(one) for one in scenes] + [""] * count
        ids = self.tokenizer(texts, padding="max_length", max_length=TEXT_TOKENS, return_tensors="pt").input_ids
        bias = zero_token_bias(clean.shape[-1] * clean.shape[-2] // 4, ZERO_TOKENS)
        for left in range(ROUNDS, 0, -1):
            level = levels * left / ROUNDS
            told, untold = self.model(torch.cat([latents] * 2), torch.cat([level] * 2), ids, bias).chunk(2)
            velocity = untold + GUIDANCE * (told - untold)
            latents = latents - velocity * (levels / ROUNDS)[:, None, None, None]
        return latents


def tune(
    folder: pathlib.Path, model: AutoencoderKL, figures: dict[str, float], averages: dict[str, torch.Tensor], steps: int
) -> None:
    """Train the decoder for ``steps`` steps into ``vae-tuned.pt`` in ``folder``, going on from there if it is there."""
    roughen = Roughener(averages)
    parameters = list(model.decoder.parameters())
    kernels = [param for param in parameters if param.ndim == 4]
    others = [param for param in parameters if param.ndim != 4]
    optimizers = [Muon(kernels, PEAK_RATE, decay=0.0), torch.optim.Adam(others, PEAK_RATE, betas=(0.9, 0.99))]
    step, clock, mean = 0, Clock(), float("nan")
    state = load_if_there(folder / "vae-tuned.pt")
    if state is not None:
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, clock = state["step"], Clock(state["seconds"])
    while step < steps:
        pixels = (64, 64, 64, 64, 32, 64, 48, 64, 64, 96)[step % 10]
        count = BATCH * 64 * 64 // max(64 * 64, pixels * pixels)  # 12, of 96 pixels 5
        error = _advance(model, roughen, figures, step, count, pixels, optimizers, _rate(step, steps))
        step += 1
        mean = error if math.isnan(mean) else 0.95 * mean + 0.05 * error
        if step % 20 == 0:
            log(folder, f"decoder step {step}/{steps} mean abs error {mean * 127.5:.2f}/255 {clock.seconds():.0f} s")
        if step % EVERY == 0 or step == steps:
            done = {"model": model.state_dict(), "optimizers": [one.state_dict() for one in optimizers]}
            save_atomically({**done, "step": step, "seconds": clock.seconds()}, folder / "vae-tuned.pt")
            show(model, folder / "vae-tuned.png")


def _rate(step: int, steps: int) -> float:
    return PEAK_RATE * min(1.0, (step + 1) / WARM_UP, (steps - step) / steps * 1.3)


def _advance(
    model: AutoencoderKL, roughen: Roughener, figures: dict[str, float], step: int, count: int, pixels: int,
    optimizers: list[torch.optim.Optimizer], rate: float,
) -> float:  # fmt: skip
    scenes, pictures = draw_batch(np.random.default_rng((4, step)), count, pixels)
    target = to_tensor(pictures).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        clean = (model.encode(target).latent_dist.mean - figures["shift"]) * figures["factor"]
    rough = roughen(clean.contiguous(), scenes, torch.Generator().manual_seed(step))
    rough = rough.contiguous(memory_format=torch.channels_last)
    error = model.decode(rough / figures["factor"] + figures["shift"]).sample - target
    loss = error.abs().mean() + 2.0 * error.square().mean()
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.decoder.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    return float(error.detach().abs().mean())
