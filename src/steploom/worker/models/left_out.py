"""Components that are left out (``components={"text_encoder_3": None}``): which a pipeline can do without."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from steploom.errors import ConfigError
from steploom.weave import untyped

_DECODERS = ("vae", "vqvae", "movq", "vqgan", "vocoder", "audio_vae")
"""What only makes pictures or sound of latents, which a request may ask for instead."""

_DENOISERS = ("transformer", "unet")

_PREPROCESSORS = ("tokenizer", "processor", "feature_extractor", "image_processor")
"""Beginnings of the names of what only feeds an encoder."""


def names(index: Mapping[str, Any]) -> list[str]:
    """The components that may be named to be left out: those of an index, with or without a class, and of its class."""
    cls = _class_of(index)
    listed = [name for name, entry in index.items() if isinstance(entry, (list, tuple)) and not name.startswith("_")]
    return sorted({*listed, *(() if cls is None else untyped.component_names(cls))})


def refuse(name: str, given: Mapping[str, Any], index: Mapping[str, Any]) -> None:
    """Refuses to leave out a component without which no request could be served.

    Args:
        name: The component.
        given: All that is replaced or left out, by name.
        index: Of the pipeline; of a class that is not diffusers' own nothing is known, and nothing refused.

    Raises:
        ConfigError: Says what can be left out.
    """
    cls = _class_of(index)
    optional: list[str] = [] if cls is None else list(getattr(cls, "_optional_components", ()))
    left = [one for one in index if _is_there(one, index) and given.get(one, one) is not None]
    last = name.startswith(_DENOISERS) and not any(one.startswith(_DENOISERS) for one in left)  # Wan 2.2 has two
    without = name in optional and not last
    if cls is None or not _is_there(name, index) or without or _spared(name) or _feeds_nothing(name, given):
        return
    present = [one for one in optional if one != name and _is_there(one, index)]
    others = f"{', '.join(present)}, " if present else ""
    raise ConfigError(
        f"components[{name!r}]=None: {cls.__name__} makes nothing without it; give another one, or leave it as it is "
        f"(it can do without {others}a VAE where latents are asked for, and text encoders, with their tokenizers, "
        "where every request gives embeddings)"
    )


def decoder(pipeline: Any, output_types: Collection[str]) -> str:
    """The component that a pipeline was loaded without, so that it makes nothing but latents; "" if there is none.

    Args:
        pipeline: What was loaded.
        output_types: Of which it makes one.
    """
    parts = untyped.components_of(pipeline) if "latent" in output_types else {}
    optional: list[str] = list(getattr(type(pipeline), "_optional_components", ()))
    return next((name for name in _DECODERS if parts.get(name, name) is None and name not in optional), "")


def _is_there(name: str, index: Mapping[str, Any]) -> bool:
    entry = index.get(name)
    return not name.startswith("_") and isinstance(entry, (list, tuple)) and bool(entry) and entry[0] is not None


def _spared(name: str) -> bool:
    return name in _DECODERS or "encoder" in name


def _feeds_nothing(name: str, given: Mapping[str, Any]) -> bool:
    """Whether it prepares what is for an encoder that is left out as well."""
    if not name.startswith(_PREPROCESSORS):
        return False
    if name.startswith("tokenizer"):
        return given.get(name.replace("tokenizer", "text_encoder"), name) is None
    return any("encoder" in other and where is None for other, where in given.items())


def _class_of(index: Mapping[str, Any]) -> Any:
    named = index.get("_class_name")
    return untyped.pipeline_class(named) if isinstance(named, str) else None
