"""A case: one model at one size, and how its requests are made."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from gpu import models
from gpu.architectures import ARCHITECTURES, Architecture
from gpu.budget import Budget
from gpu.machine import Clock


@dataclasses.dataclass
class Case:
    """One model at one size.

    Attributes:
        name: Of the architecture.
        size: Height and width in pixels.
        pipe: The pipeline.
        budget: Of time.
        tiny: Whether it is a CPU's size.
        device: Where it runs.
        dtype: Of the weights.
        steps: Of each measured request.
        encoders: Whether there are text encoders.
        rounds: How often both sides take turns.
        repeats: How many requests join, are cancelled, come and go.
        attention: Backend that was set, by diffusers' name.
        compiled: Whether the repeated blocks are compiled.
        engine_options: Further settings of the engines.
    """

    name: str
    size: int
    pipe: Any
    budget: Budget
    tiny: bool
    device: str
    dtype: str
    steps: int
    encoders: bool
    rounds: int = 3
    repeats: int = 5
    attention: str | None = None
    compiled: bool = False
    engine_options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.clock = Clock(self.device)

    @property
    def architecture(self) -> Architecture:
        """The configuration of the model."""
        return ARCHITECTURES[self.name]

    @property
    def label(self) -> str:
        """As lines of progress call it."""
        return f"{self.name} {self.size}x{self.size}"

    @property
    def module(self) -> Any:
        """The denoiser."""
        return getattr(self.pipe, self.architecture.denoiser)

    def request(self, seed: int, steps: int | None = None) -> dict[str, Any]:
        """A request with embeddings given, latents out."""
        given = models.request(self.name, self.size, seed, tiny=self.tiny, device=self.device, dtype=self.dtype)
        return {**given, "num_inference_steps": steps or self.steps, "output_type": "latent"}

    def worded(self, seed: int, steps: int) -> dict[str, Any]:
        """A request that has to be encoded, where there are encoders, and decoded."""
        if self.encoders and self.architecture.encoders:
            given = models.worded(self.name, self.size, seed, tiny=self.tiny)
        else:
            given = self.request(seed)
        video = self.architecture.frames is not None
        return {**given, "num_inference_steps": steps, "output_type": "np" if video else "pil"}

    def alone(self, requests: list[dict[str, Any]], seeds: list[int]) -> tuple[float, Any]:
        """Seconds per request of ``pipe(...)``, one at a time, and the last latents."""
        latents = None
        began = self.clock.now()
        for request, seed in zip(requests, seeds, strict=True):
            latents = self.pipe(**request, generator=torch.Generator("cpu").manual_seed(seed), return_dict=False)[0]
        return (self.clock.now() - began) / len(requests), latents
