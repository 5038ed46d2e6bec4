"""What a PNG file says of how it was made: for people and other programs, and for ours to make it again."""

from __future__ import annotations

import json
from typing import Any

from steploom.server.fields import ImageFields

KEYWORD = "steploom"
"""Of the text chunk that holds the fields of the request, as JSON."""

_LABELS = {
    "num_inference_steps": "Steps",
    "guidance_scale": "CFG scale",
    "true_cfg_scale": "True CFG scale",
    "strength": "Denoising strength",
}


def notes_of(fields: ImageFields, seed: int | None, size: tuple[int, int]) -> dict[str, str]:
    """Texts by keyword: ``steploom`` has the fields that make the image again, ``parameters`` the same in the form that
    Stable Diffusion's web interfaces read. No user, no file's name.
    """
    made: dict[str, Any] = {"prompt": fields.prompt, **fields.params, "seed": seed}
    made |= {"width": size[0], "height": size[1]}
    if fields.model is not None:
        made["model"] = fields.model
    if fields.own.get("lora"):
        made["lora"] = [{"name": name, "scale": scale} for name, scale in fields.own["lora"]]
    if "cache" in fields.own:
        made["cache"] = fields.own["cache"]
    lines = [fields.prompt]
    if fields.params.get("negative_prompt"):
        lines.append(f"Negative prompt: {fields.params['negative_prompt']}")
    said = [f"{label}: {fields.params[name]}" for name, label in _LABELS.items() if name in fields.params]
    model = [f"Model: {fields.model}"] if fields.model is not None else []
    lines.append(", ".join([*said, f"Seed: {seed}", f"Size: {size[0]}x{size[1]}", *model]))
    return {KEYWORD: json.dumps(made), "parameters": "\n".join(lines).encode("utf-8", "replace").decode()}
