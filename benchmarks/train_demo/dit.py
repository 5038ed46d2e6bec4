"""Third stage: train the text encoders and the denoiser on the bank, by rectified flow."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import signal
import time
from typing import Any

import numpy as np
import torch
from bank import Bank
from common import Checkpoint, Clock, load_if_there, log, save_atomically
from export import assemble, export, sample_sheet
from models import TEXT_TOKENS, OneZeroToken, Trained, build_tokenizer, zero_token_bias
from optim import Muon, split
from transformers import PreTrainedTokenizerFast

from steploom.demo import scene

BATCH = 64
PEAK_RATE = 2e-3
WARM_UP = 150
EMA = 0.998
DROP = 0.12  # share of prompts replaced by ""
SAVE_EVERY = 120.0  # seconds
SHOW_EVERY = 900.0  # seconds
SIDES = (64, 32, 48, 96)
LATE = 2500  # from this step on, layout is learnt: noise levels and sizes lean to the outlines at 64 pixels
FALL = 0.4  # share of the steps before the polish in which the rate falls to nothing
POLISH = 2 / 7  # share of all steps, the last ones: stars and rings are shown much more often
POLISH_RATE = 1.5e-3
OUTLINE = 0.75  # what all shapes of a picture weigh in the loss beside all of the picture, without noise
SIDE_SHARES, LATE_SIDE_SHARES = (0.85, 0.05, 0.05, 0.05), (0.91, 0.03, 0.03, 0.03)
NOISE_LEAN, LATE_NOISE_LEAN = 0.4, 0.0
ZERO_COUNTS, ZERO_SHARES = (256, 8, 16, 64, 128), (0.5, 0.1, 0.25, 0.1, 0.05)


@dataclasses.dataclass
class Schedule:
    """Learning rate by step: a rise, a plateau, and a straight fall to nothing; then the polish falls once more."""

    steps: int

    def polishes(self, step: int) -> bool:
        """Whether a step is one of the polish."""
        return step >= self._main

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        if self.polishes(step):
            return POLISH_RATE * (self.steps - step) / (self.steps - self._main)
        rise = min(1.0, (step + 1) / WARM_UP)
        return PEAK_RATE * rise * min(1.0, (self._main - step) / (FALL * self._main))

    @property
    def _main(self) -> int:
        return round((1 - POLISH) * self.steps)


def weights(shapes: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """Weigh the latents (n, 1, h, w) of a batch, 1 on average: those of shapes more, the less noise there is.

    A picture is mostly background, which is soon learnt; small shapes count as much as large ones. In much noise a
    weight by what is under it would draw shapes to where they may be, so there is none.
    """
    share = shapes.float().mean(dim=(1, 2)).clamp_min(0.04)
    raised = 1 + shapes * ((1 - level) * (OUTLINE / share).clamp_max(8.0))[:, None, None]
    return (raised / raised.mean())[:, None]


def sigmas(count: int, lean: float, generator: torch.Generator) -> torch.Tensor:
    """Draw noise levels (n,): most logit-normal, leaning to noise, where layout is decided, by ``lean``; some even."""
    normal = torch.sigmoid(torch.randn(count, generator=generator) + lean)
    even = torch.rand(count, generator=generator)
    return torch.where(torch.rand(count, generator=generator) < 0.15, even, normal)


class Trainer:
    """Everything that a checkpoint holds, and how to go on from one."""

    def __init__(self, folder: pathlib.Path, bank: Bank, steps: int) -> None:
        torch.manual_seed(0)
        self.folder, self.bank = folder, bank
        self.tokenizer: PreTrainedTokenizerFast = build_tokenizer()
        self.model = Trained(self.tokenizer)
        self.model.transformer.set_attn_processor(OneZeroToken())  # type: ignore[arg-type]
        matrices, others = split(self.model)
        adamw = torch.optim.AdamW(others, lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
        self.optimizers: list[torch.optim.Optimizer] = [Muon(matrices, lr=PEAK_RATE), adamw]
        self.step, self.clock = 0, Clock()
        self.schedule = Schedule(steps)
        self.averages = {name: value.clone() for name, value in self.model.state_dict().items()}
        self._resume(load_if_there(folder / "dit.pt"))
        self.mean = float("nan")
        self._stop = False
        signal.signal(signal.SIGTERM, self._on_stop)

    @property
    def done(self) -> bool:
        """Whether the schedule has come to its end."""
        return self.step >= self.schedule.steps

    def _on_stop(self, *_: Any) -> None:
        self._stop = True

    def _resume(self, state: Checkpoint | None) -> None:
        if state is None:
            return
        begun = Schedule(**state["schedule"])
        if begun != self.schedule:  # every rate so far has followed it
            raise SystemExit(
                f"--steps {self.schedule.steps}: {self.folder / 'dit.pt'} has been trained to step {state['step']} for "
                f"--steps {begun.steps}, which sets the learning rates; give --steps {begun.steps}, or another --folder"
            )
        self.model.load_state_dict(state["model"])
        self.averages = state["averages"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.clock = state["step"], Clock(state["seconds"], state["busy"])
        log(self.folder, f"dit: going on from step {self.step}")

    def save(self) -> None:
        """Write ``dit.pt``; every draw of a step is seeded by its number, so the step is the whole random state."""
        state = {
            "model": self.model.state_dict(),
            "averages": self.averages,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.clock.seconds(),
            "busy": self.clock.busy(),
            "schedule": dataclasses.asdict(self.schedule),
        }
        save_atomically(state, self.folder / "dit.pt")

    def prompts(self, scenes: list[scene.Scene], rng: np.random.Generator) -> torch.Tensor:
        """Return token ids (n, TEXT_TOKENS) of loosely worded prompts, some left empty."""
        texts = ["" if rng.random() < DROP else scene.loose_prompt(one, rng) for one in scenes]
        out = self.tokenizer(texts, padding="max_length", max_length=TEXT_TOKENS, return_tensors="pt")
        return out.input_ids

    def loss(self) -> torch.Tensor:
        """Return the loss of the step's batch."""
        rng = np.random.default_rng((3, self.step))
        generator = torch.Generator().manual_seed(self.step)
        late = self.step >= LATE
        pixels = int(rng.choice(SIDES, p=LATE_SIDE_SHARES if late else SIDE_SHARES))
        count = BATCH // 2 if pixels > 64 else BATCH
        scenes, clean, shapes = self.bank.batch(rng, pixels, count, lean=self.schedule.polishes(self.step))
        noise = torch.randn(clean.shape, generator=generator)
        level = sigmas(count, LATE_NOISE_LEAN if late else NOISE_LEAN, generator)
        mixed = torch.lerp(clean, noise, level[:, None, None, None])
        bias = zero_token_bias((pixels // 8) ** 2, int(rng.choice(ZERO_COUNTS, p=ZERO_SHARES)))
        velocity = self.model(mixed, level, self.prompts(scenes, rng), bias)
        return (weights(shapes, level) * (velocity - (noise - clean)).square()).mean()

    def advance(self) -> None:
        """Take one step."""
        rate = self.schedule.rate(self.step)
        loss = self.loss()
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        keep = min(EMA, (1 + self.step) / (10 + self.step))
        state = self.model.state_dict()
        torch._foreach_lerp_([self.averages[name] for name in state], list(state.values()), 1 - keep)
        now = float(loss.detach())
        self.mean = now if math.isnan(self.mean) else 0.98 * self.mean + 0.02 * now

    def show(self, target: pathlib.Path | None) -> None:
        """Draw a sheet of samples with the averaged weights and, if there is a ``target``, export them to it."""
        pipe = assemble(self.folder, self.averages)
        said = sample_sheet(pipe, self.folder / f"samples-{self.step:05d}.png")
        log(self.folder, f"dit step {self.step} held-out samples: {said}")
        if target is not None:
            log(self.folder, f"dit step {self.step} exported {export(pipe, target) / 1e6:.2f} MB")

    def run(self, target: pathlib.Path | None) -> None:
        """Train to the end of the schedule, or until told to stop, saving and drawing samples on the way."""
        last = shown = time.monotonic()
        while not self.done and not self._stop:
            self.advance()
            if self.step % 20 == 0:
                spent, rate = self.clock.seconds(), self.schedule.rate(self.step)
                busy = self.clock.busy()
                text = f"loss {self.mean:.4f} rate {rate:.1e} {spent:.0f} s (busy {busy:.0f} s)"
                log(self.folder, f"dit step {self.step}/{self.schedule.steps} {text}")
            if time.monotonic() - last > SAVE_EVERY:
                self.save()
                last = time.monotonic()
            if time.monotonic() - shown > SHOW_EVERY:
                self.show(target)
                shown = time.monotonic()
        self.save()
        self.show(target)
        log(self.folder, f"dit: stopped at step {self.step}")
