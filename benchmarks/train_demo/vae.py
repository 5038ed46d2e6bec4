"""First stage: train the autoencoder on freshly drawn scenes."""

from __future__ import annotations

import math
import pathlib

import numpy as np
import torch
from common import Clock, draw_batch, load_if_there, log, save_atomically, to_tensor
from diffusers import AutoencoderKL
from optim import Muon
from PIL import Image
from torch.nn import functional

BATCH = 12
PEAK_RATE = 4e-3
WARM_UP = 20
KL_WEIGHT = 1e-4
EVERY = 100  # steps between checkpoints


def build() -> AutoencoderKL:
    """Return the untrained autoencoder: 64x64 pixels to 16x16 latents of 8 channels and back."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=1,  # more groups lose the absolute colour of flat pictures
        sample_size=64,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def rate(step: int, steps: int) -> float:
    """Learning rate of a step: a short rise, a plateau, and a straight fall to nothing over the last half."""
    return PEAK_RATE * min(1.0, (step + 1) / WARM_UP, 2 * (steps - step) / steps)


def loss_of(model: AutoencoderKL, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the training loss of pictures (n, 3, h, w) and, detached, their mean absolute error."""
    posterior = model.encode(pictures).latent_dist
    redrawn = model.decode(posterior.sample()).sample
    error = redrawn - pictures
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    loss = error.abs().mean() + 2.0 * error.square().mean() + KL_WEIGHT * kl
    return loss, error.detach().abs().mean()


def train(folder: pathlib.Path, steps: int) -> AutoencoderKL:
    """Train up to ``steps`` steps, going on from ``vae.pt`` in ``folder`` if it is there."""
    torch.manual_seed(0)
    model = build()
    kernels = [param for param in model.parameters() if param.ndim == 4]
    others = [param for param in model.parameters() if param.ndim != 4]
    optimizers = [Muon(kernels, PEAK_RATE, decay=0.0), torch.optim.Adam(others, PEAK_RATE, betas=(0.9, 0.99))]
    state = load_if_there(folder / "vae.pt")
    step, clock = 0, Clock()
    if state is not None:
        if (begun := state.get("steps", steps)) != steps:  # every rate so far has followed it
            raise SystemExit(
                f"--vae-steps {steps}: {folder / 'vae.pt'} has been trained to step {state['step']} for --vae-steps "
                f"{begun}, which sets the learning rates; give --vae-steps {begun}, or another --folder"
            )
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, clock = state["step"], Clock(state["seconds"])
    mean = float("nan")
    while step < steps:
        torch.manual_seed(1000 + step)
        pixels = (64, 64, 64, 64, 32, 48, 64, 96)[step % 8]

        count = BATCH * 64 * 64 // max(64 * 64, pixels * pixels)  # 12, of 96 pixels 5
        _, pictures = draw_batch(np.random.default_rng((1, step)), count, pixels)
        loss, error = loss_of(model, to_tensor(pictures).contiguous(memory_format=torch.channels_last))
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate(step, steps)
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        mean = float(error) if math.isnan(mean) else 0.95 * mean + 0.05 * float(error)
        if step % 20 == 0:
            log(folder, f"vae step {step}/{steps} mean abs error {mean * 127.5:.2f}/255 {clock.seconds():.0f} s")
        if step % EVERY == 0 or step == steps:
            done = {"model": model.state_dict(), "optimizers": [one.state_dict() for one in optimizers]}
            save_atomically({**done, "step": step, "steps": steps, "seconds": clock.seconds()}, folder / "vae.pt")
            show(model, folder / "vae.png")
    return model


@torch.no_grad()
def show(model: AutoencoderKL, file: pathlib.Path) -> None:
    """Save a sheet: a row of drawn pictures above the row of what the autoencoder makes of them."""
    _, pictures = draw_batch(np.random.default_rng(7), 10, 64)
    redrawn = model.decode(model.encode(to_tensor(pictures)).latent_dist.mean).sample
    rows = [np.concatenate(list(pictures), axis=1), np.concatenate(list(to_pictures(redrawn)), axis=1)]
    Image.fromarray(np.concatenate(rows)).resize((1280, 256), Image.Resampling.NEAREST).save(file)


def to_pictures(tensor: torch.Tensor) -> np.ndarray:
    """Turn a float tensor (n, 3, h, w) in -1..1 into 8-bit pictures (n, h, w, 3)."""
    return tensor.add(1).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy()


@torch.no_grad()
def statistics(model: AutoencoderKL) -> tuple[float, float]:
    """Return the mean and the standard deviation of latents of 512 drawn pictures."""
    _, pictures = draw_batch(np.random.default_rng(5), 512, 64)
    latents = torch.cat([model.encode(part).latent_dist.mean for part in to_tensor(pictures).split(64)])
    return float(latents.mean()), float(latents.std())


def measure(model: AutoencoderKL, folder: pathlib.Path) -> dict[str, float]:
    """Measure the shift and factor that give latents mean 0 and variance 1; keep them in ``latents.pt``."""
    mean, deviation = statistics(model)
    figures = {"shift": mean, "factor": 1 / deviation, "error": decode_error(model)}
    log(folder, f"vae: mean abs error {figures['error']:.2f}/255 on pictures never trained on")
    save_atomically(figures, folder / "latents.pt")
    return figures


def decode_error(model: AutoencoderKL, count: int = 256) -> float:
    """Return the mean absolute error, in 8-bit levels, of redrawing pictures never trained on."""
    _, pictures = draw_batch(np.random.default_rng(6), count, 64)
    with torch.no_grad():
        target = to_tensor(pictures)
        return float(functional.l1_loss(model.decode(model.encode(target).latent_dist.mean).sample, target)) * 127.5
