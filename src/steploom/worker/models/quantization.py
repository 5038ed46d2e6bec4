"""Which component is quantized, and by which config of diffusers or transformers."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from steploom.errors import ConfigError
from steploom.weave import signatures, untyped
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
            arguments["quant_type"] = _torchao(name, arguments["quant_type"])
        if backend == "gguf":
            compute = arguments.get("compute_dtype")
            return known[backend](getattr(torch, compute) if isinstance(compute, str) else compute)
        made = known[backend](**arguments)
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        raise ConfigError(f"quantization_config: {backend} for {name!r} with {arguments!r}: {error}") from None
    except ImportError as error:  # also of a package without its metadata
        mend = "; pip install " + {"bitsandbytes_4bit": "bitsandbytes", "bitsandbytes_8bit": "bitsandbytes"}.get(
            backend, backend
        )
        raise ConfigError(f"quantization_config: {backend} for {name!r}: {error}{mend}") from None
    unknown = arguments.keys() - set(signatures.parameters_of(type(made).__init__)) - vars(made).keys()
    if unknown:
        raise ConfigError(
            f"quantization_config: {backend} for {name!r}: {type(made).__name__} does not know "
            f"{', '.join(sorted(unknown))}; it takes {', '.join(_takes(made))}"
        )
    return made


def _torchao(name: str, given: Any) -> Any:
    """Torchao's own description of a quantization."""
    quantization = importlib.import_module("torchao.quantization")
    try:
        made = untyped.torchao_config(given)
        if type(made).__module__.partition(".")[0] == "torchao":
            return made
        why = f"is a {type(made).__name__}"
    except (AttributeError, TypeError, ValueError, LookupError) as error:
        why = str(error)
    known = [one for one in dir(quantization) if one.endswith("Config")]
    wanted = str(given).replace("_", "").removesuffix("Config").lower()
    nearest = difflib.get_close_matches(
        wanted, by_letters := {one.removesuffix("Config").lower(): one for one in known}, 1
    )
    hint = f"; did you mean {by_letters[nearest[0]]!r}?" if nearest else f"; it has {', '.join(known)}"
    raise ConfigError(
        f"quantization_config: torchao for {name!r} with quant_type={given!r}: {why}; give the name of a config of "
        f"torchao.quantization, or such a config{hint}"
    )


def _takes(config: Any) -> list[str]:
    """What a config is made of."""
    return [name for name in signatures.parameters_of(type(config).__init__) if name not in ("self", "kwargs")]


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
