"""Which component is quantized, and by which config of diffusers or transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from steploom.errors import ConfigError
from steploom.weave import untyped
from steploom.worker.portable import ARGUMENTS, FORM


class Quantization:
    """Which component is quantized how.

    Args:
        given: ``EngineConfig.quantization_config``.
        libraries: The library of each component that holds weights, by name.
        denoisers: Those that are quantized where a single config names none.

    Attributes:
        configs: The config object of each component that is quantized.

    Raises:
        ConfigError: It names a backend, an argument or a component that does not exist.
    """

    def __init__(self, given: Any, libraries: Mapping[str, str], denoisers: Sequence[str]) -> None:
        wanted = _by_component(given, list(libraries), denoisers)
        for name in wanted:
            if name not in libraries:
                raise ConfigError(
                    f"quantization_config: the model has no component {name!r} with weights that diffusers "
                    f"or transformers can quantize; those that it has are {', '.join(libraries)}"
                )
        self.configs: dict[str, Any] = {name: _make(name, libraries[name], how) for name, how in wanted.items()}


def _make(name: str, library: str, how: Any) -> Any:
    """The config object for one component."""
    if hasattr(how, "quant_method"):
        return how
    arguments = dict(how)
    backend = arguments.pop("quant_method", None)
    known = untyped.quantization_configs(library)
    if backend not in known:
        raise ConfigError(
            f"quantization_config: the backend {backend!r} for {name!r}: {library} has {', '.join(sorted(known))}"
        )
    try:
        if backend == "torchao" and "quant_type" in arguments:
            arguments["quant_type"] = untyped.torchao_config(arguments["quant_type"])
        if backend == "gguf":
            compute = arguments.get("compute_dtype")
            return known[backend](getattr(torch, compute) if isinstance(compute, str) else compute)
        return known[backend](**arguments)
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"quantization_config: {backend} for {name!r} with {arguments!r}: {error}") from None
    except ImportError as error:  # also of a package without its metadata
        mend = "; pip install " + {"bitsandbytes_4bit": "bitsandbytes", "bitsandbytes_8bit": "bitsandbytes"}.get(
            backend, backend
        )
        raise ConfigError(f"quantization_config: {backend} for {name!r}: {error}{mend}") from None


def _by_component(given: Any, components: Sequence[str], denoisers: Sequence[str]) -> dict[str, Any]:
    """A config object, or a mapping with ``quant_method``, for each component that ``given`` names."""
    if given is None:
        return {}
    if hasattr(given, "quant_method"):  # one config of diffusers', as ``from_pretrained`` of a model takes it
        return dict.fromkeys(denoisers, given)
    arguments: dict[str, Any] = (
        {name: getattr(given, name) for name in ARGUMENTS} if hasattr(given, "quant_mapping") else dict(given)
    )
    if "quant_method" in arguments:
        return dict.fromkeys(denoisers, arguments)
    unknown = arguments.keys() - set(ARGUMENTS)
    if unknown or not (arguments.get("quant_backend") or arguments.get("quant_mapping")):
        raise ConfigError(f"quantization_config={given!r}: {FORM}")
    if arguments.get("quant_backend") and arguments.get("quant_mapping"):
        raise ConfigError(f"quantization_config={given!r}: give either quant_backend or quant_mapping; {FORM}")
    if arguments.get("quant_mapping"):
        return dict(arguments["quant_mapping"])
    names = arguments.get("components_to_quantize") or components
    how = {"quant_method": arguments["quant_backend"], **(arguments.get("quant_kwargs") or {})}
    return dict.fromkeys([names] if isinstance(names, str) else names, how)
