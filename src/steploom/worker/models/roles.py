"""What a model of diffusers is for, as far as it must be another one of the same kind that takes its place."""

from __future__ import annotations

from typing import Any

CONTROLNET = "a ControlNet"


def of(cls: Any) -> str:
    """The role of a class of components: two that differ in it cannot stand for each other."""
    if "ControlNet" in cls.__name__:
        return CONTROLNET
    if hasattr(cls, "set_timesteps"):
        return "a noise scheduler"
    if hasattr(cls, "decode") and hasattr(cls, "forward"):
        return "an autoencoder"
    return "a model that neither is a ControlNet nor decodes" if hasattr(cls, "forward") else "no model"


def told(cls: Any) -> str:
    """Which class there is, and its role."""
    return f"is a folder of {cls.__name__}, {of(cls)}"
