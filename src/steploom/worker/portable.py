"""How settings that are mappings travel to a worker: without the objects of other libraries."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

import msgspec

from steploom.errors import ConfigError

ARGUMENTS = ("quant_backend", "quant_kwargs", "components_to_quantize", "quant_mapping")
"""What diffusers' ``PipelineQuantizationConfig`` takes."""
FORM = (
    "give {'quant_backend': 'torchao', 'quant_kwargs': {'quant_type': 'int8_weight_only'}, "
    "'components_to_quantize': ['transformer']}, the arguments of diffusers' PipelineQuantizationConfig"
)
"""The mend of what is none."""


def portable(value: Any) -> Any:
    """``value`` without the config objects of other libraries, which do not travel: each as a mapping."""
    if isinstance(value, Mapping):
        return {str(key): portable(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [portable(entry) for entry in value]
    if hasattr(value, "quant_mapping"):  # PipelineQuantizationConfig
        return {name: portable(getattr(value, name)) for name in ARGUMENTS if getattr(value, name)}
    if hasattr(value, "quant_method"):
        fields = {name: entry for name, entry in value.to_dict().items() if not name.startswith("_")}
        return {**portable(fields), "quant_method": getattr(value.quant_method, "value", value.quant_method)}
    if type(value).__module__.startswith("torchao.") and dataclasses.is_dataclass(value):
        return sys.modules["torchao.core.config"].config_to_dict(value)
    return value


def travelling(name: str, value: Any) -> Any:
    """The value of the setting ``name`` as it travels.

    Raises:
        ConfigError: Something in it cannot reach a worker process.
    """
    plain = portable(value)
    try:
        msgspec.msgpack.encode(plain, enc_hook=_torch_too)
    except (TypeError, NotImplementedError) as error:
        mend = FORM if name == "quantization_config" else "give plain values"
        raise ConfigError(
            f"{name}={value!r}: cannot travel to a worker process ({error}); {mend}, or start with "
            "distributed_executor_backend='inproc'"
        ) from None
    return plain


def _torch_too(value: Any) -> Any:
    if type(value).__module__ == "torch" and type(value).__name__ in ("dtype", "device"):
        return str(value)  # the codec knows them
    raise TypeError(f"{type(value).__module__}.{type(value).__name__}")
