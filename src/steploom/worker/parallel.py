"""The ranks of a worker share the forwards of its transformers, by diffusers' context and tensor parallelism."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from steploom.config import EngineConfig, keep_to_this_machine
from steploom.config.parallel import asked
from steploom.errors import ConfigError, GenerationFailed
from steploom.weave import untyped
from steploom.worker.ranks import Rank

MEET_S = 120.0
"""Seconds that ranks which have loaded may take to find each other."""
SILENT = datetime.timedelta(days=365)
"""How long torch may wait for another rank: one that is lost ends its worker at once, and a tick has a time of its own.
"""

_UNEVEN = "divisible by mesh size"
"""What diffusers says of a length that cannot be shared evenly."""


def refuse(config: EngineConfig, device: torch.device, models: dict[str, Any], pipeline: str) -> None:
    """Refuses what the ranks of a worker cannot do together. All of them come to the same.

    Args:
        config: The settings, which ask for several ranks.
        device: Of this one.
        models: The denoisers, by name.
        pipeline: Its class.

    Raises:
        ConfigError: The device or a model cannot.
    """
    own, sharded = asked(config), config.tensor_parallel_size > 1
    if device.type != "cuda" and (sharded or config.ring_degree > 1):
        mend = "use ulysses_degree, which runs on a CPU too" if device.type == "cpu" else "use CUDA devices"
        raise ConfigError(f"{own}: diffusers does it on GPUs only, and this is {str(device)!r}; {mend}")
    plan = "_tp_plan" if sharded else "_cp_plan"
    for name, model in models.items():
        if getattr(model, plan, None) is None:
            how = "tensor" if sharded else "context"
            raise ConfigError(
                f"{own}: {type(model).__name__} ({pipeline}.{name}) has no {plan}, so diffusers has no {how} "
                "parallelism for it; leave it 1, and use data_parallel_size for several devices"
            )
        heads = getattr(getattr(model, "config", None), "num_attention_heads", None)
        if isinstance(heads, int) and _splits_heads_evenly(config) > 1 and heads % _splits_heads_evenly(config):
            raise ConfigError(
                f"{own}: {name} has {heads} attention heads, which cannot be shared evenly; take a divisor"
            )
    if not models:
        raise ConfigError(f"{own}: {pipeline} has no denoiser to share; leave it 1")


def _splits_heads_evenly(config: EngineConfig) -> int:
    """By what the number of heads has to be divisible; Ulysses by itself needs no such thing."""
    return config.tensor_parallel_size * (config.ulysses_degree if config.ring_degree > 1 else 1)


def share(config: EngineConfig, rank: Rank, device: torch.device, models: dict[str, Any]) -> None:
    """Has the models share their forwards with those of the other ranks, once all have loaded.

    Raises:
        ConfigError: A model cannot.
    """
    rank.meet()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    mesh = _mesh(rank, device.type, config.ring_degree, config.ulysses_degree, config.tensor_parallel_size)
    if config.tensor_parallel_size > 1:
        degrees: dict[str, int] = {"tp_degree": config.tensor_parallel_size}
    else:
        degrees = {"ring_degree": config.ring_degree, "ulysses_degree": config.ulysses_degree}
    for name, model in models.items():
        try:
            found = untyped.parallelize(model, mesh, rank.index, device, degrees)
        except (ValueError, NotImplementedError) as error:
            raise ConfigError(f"{asked(config)}: {name} cannot ({' '.join(str(error).split())})") from None
        heads = getattr(getattr(model, "config", None), "num_attention_heads", None)
        if isinstance(heads, int) and heads % config.ulysses_degree:
            found.ulysses_anything = True  # for good: no length would make it even
        model.__dict__["_steploom_shares"] = found


@functools.cache
def _mesh(rank: Rank, kind: str, ring: int, ulysses: int, sharded: int) -> Any:
    """The ranks in their order, for torch; the first time they find each other."""
    keep_to_this_machine()
    store = dist.FileStore(rank.store, rank.size)  # pyright: ignore[reportPrivateImportUsage] - documented
    store.set_timeout(datetime.timedelta(seconds=MEET_S))
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank.index, world_size=rank.size, timeout=SILENT)
    shape, names = ((sharded,), ("tp",)) if sharded > 1 else ((ring, ulysses), ("ring", "ulysses"))
    return dist.device_mesh.init_device_mesh(kind, shape, mesh_dim_names=names)


def around(model: Any, run: Callable[..., Any]) -> Callable[..., Any]:
    """``run``, which calls ``model``, for lengths of any kind: those that cannot be shared evenly are shared unevenly.

    That takes diffusers' ``ulysses_anything`` or ``ring_anything``, which is slower, since ranks tell each other sizes
    in each layer; so only for calls that need it. No message has passed when diffusers finds that a length is uneven,
    and all ranks find it alike.
    """
    found = model.__dict__.get("_steploom_shares")
    if found is None or not hasattr(found, "ulysses_anything"):
        return run

    def shared(*args: Any, **kwargs: Any) -> Any:
        try:
            return run(*args, **kwargs)
        except AssertionError as error:
            if _UNEVEN not in str(error):
                raise
        if found.ulysses_degree > 1 and found.ring_degree > 1:
            raise GenerationFailed(
                f"ulysses_degree={found.ulysses_degree}, ring_degree={found.ring_degree}: the lengths of this image or "
                f"text cannot be shared by {found.ulysses_degree * found.ring_degree} ranks evenly; ask for another "
                "size, or use one of the two, which shares unevenly"
            )
        way = "ulysses_anything" if found.ulysses_degree > 1 else "ring_anything"
        setattr(found, way, True)
        try:
            return run(*args, **kwargs)
        finally:
            setattr(found, way, False)

    return shared
