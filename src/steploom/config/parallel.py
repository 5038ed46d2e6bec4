"""How many ranks a worker has, and which settings do not go with several."""

from __future__ import annotations

from typing import TYPE_CHECKING

from steploom.errors import ConfigError

if TYPE_CHECKING:
    from steploom.config import EngineConfig

_UNLIKE = {
    "compile": "what is compiled has been tested with one rank only",
    "cuda_graphs": "a graph would replay the messages between ranks",
    "group_offload": "weights that come and go are not where the other ranks expect them",
}
"""Settings that go with one rank alone, and why."""


def refuse(config: EngineConfig) -> None:
    """Refuses settings that do not go with a worker of several ranks.

    Raises:
        ConfigError: It names the settings and the mend.
    """
    if config.ranks == 1:
        return
    own = asked(config)
    if config.tensor_parallel_size > 1 and config.ulysses_degree * config.ring_degree > 1:
        raise ConfigError(f"{own}: diffusers shards either weights or sequences; leave one of them 1")
    if config.distributed_executor_backend in ("inproc", "ray"):
        backend = f"distributed_executor_backend={config.distributed_executor_backend!r}"
        raise ConfigError(f"{own} with {backend}: ranks are processes beside each other; use 'mp'")
    if config.aside != "off":
        raise ConfigError(f"{own} with aside={config.aside!r}: ranks go by no clock; leave it 'off'")
    for name, why in _UNLIKE.items():
        if getattr(config, name):
            raise ConfigError(f"{own} with {name}={getattr(config, name)!r}: {why}; leave one of them out")
    if config.loras:
        raise ConfigError(f"{own} with loras={dict(config.loras)!r}: adapters are not sharded; leave one of them out")
    if config.tensor_parallel_size > 1 and config.quantization_config is not None:
        raise ConfigError(f"{own} with quantization_config: quantized weights cannot be sharded; leave one of them out")


def asked(config: EngineConfig) -> str:
    """The settings that ask for several ranks, as they were given."""
    names = ("ulysses_degree", "ring_degree", "tensor_parallel_size")
    return ", ".join(f"{name}={getattr(config, name)}" for name in names if getattr(config, name) > 1)
