"""Marigold: Stable Diffusion's UNet turned to dense prediction; no prompt, no guidance."""

from __future__ import annotations

from typing import Any

from conformance import parts_sd as parts
from conformance.case import case
from diffusers import MarigoldDepthPipeline

FAMILY = "Marigold"


def _inputs(i: int) -> dict[str, Any]:
    return {"image": parts.picture(i), "processing_resolution": 0, "output_latent": True, "output_type": "np"}


@case("MarigoldDepthPipeline", FAMILY, "image to depth", _inputs)
def depth() -> Any:
    scheduler = parts.ddim(prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True)
    return MarigoldDepthPipeline(**parts.parts(scheduler, checked=False, in_channels=8), prediction_type="depth")
