"""The ranks of a worker share the forwards of its transformers, by diffusers' context and tensor parallelism."""

from __future__ import annotations

import copy
import datetime
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from steploom.config import EngineConfig, keep_to_this_machine
from steploom.config.parallel import asked
from steploom.errors import ConfigError, EngineError
from steploom.weave import untyped
from steploom.weave.modules.shared import clone_tree
from steploom.worker.ranks.spmd import Rank

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
        among = config.tensor_parallel_size if sharded else config.ulysses_degree
        if _heads(model) % among and (sharded or _unevenly(config, device) is None):
            raise ConfigError(
                f"{own}: {name} has {_heads(model)} attention heads, not a multiple of it; take a divisor"
            )
    if not models:
        raise ConfigError(f"{own}: {pipeline} has no denoiser to share; leave it 1")


def share(config: EngineConfig, rank: Rank, device: torch.device, models: dict[str, Any]) -> None:
    """Has the models share their forwards with those of the other ranks, once all have loaded.

    Raises:
        ConfigError: A model cannot.
    """
    rank.meet()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    mesh = _mesh(rank, device.type, config.ring_degree, config.ulysses_degree, config.tensor_parallel_size,
                 min(SILENT.total_seconds(), config.ranks_meet_timeout_s))  # fmt: skip
    if config.tensor_parallel_size > 1:
        degrees: dict[str, int] = {"tp_degree": config.tensor_parallel_size}
    else:
        degrees = {"ring_degree": config.ring_degree, "ulysses_degree": config.ulysses_degree}
    for name, model in models.items():
        whole = None if config.tensor_parallel_size > 1 else _whole(model)
        try:
            found = untyped.parallelize(model, mesh, rank.index, device, degrees)
        except (ValueError, NotImplementedError) as error:
            raise ConfigError(f"{asked(config)}: {name} cannot ({' '.join(str(error).split())})") from None
        if whole is not None:
            unevenly = _unevenly(config, device)
            model.__dict__["_steploom_sharing"] = Sharing(found, whole, unevenly)
            if unevenly is not None and _heads(model) % config.ulysses_degree:
                setattr(found, unevenly, True)


def _unevenly(config: EngineConfig, device: torch.device) -> str | None:
    if device.type != "cuda" or (config.ulysses_degree > 1 and config.ring_degree > 1):
        return None
    return "ulysses_anything" if config.ulysses_degree > 1 else "ring_anything"


def _heads(model: Any) -> int:
    """Attention heads; 0 of a model that does not say."""
    heads = getattr(getattr(model, "config", None), "num_attention_heads", None)
    return heads if isinstance(heads, int) else 0


@functools.cache
def _mesh(rank: Rank, kind: str, ring: int, ulysses: int, sharded: int, meet_s: float) -> Any:
    """The ranks in their order, for torch; the first time they find each other."""
    keep_to_this_machine()
    store = dist.FileStore(rank.store, rank.size)  # pyright: ignore[reportPrivateImportUsage] - documented
    store.set_timeout(datetime.timedelta(seconds=meet_s))
    store.set(f"here {rank.index}", "")
    try:  # gloo would look for the others as long as it may be silent later on
        store.wait([f"here {index}" for index in range(rank.size)])
    except RuntimeError as error:
        raise EngineError(f"ranks_meet_timeout_s={meet_s:g}: the ranks have not found each other ({error})") from None
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank.index, world_size=rank.size, timeout=SILENT)
    shape, names = ((sharded,), ("tp",)) if sharded > 1 else ((ring, ulysses), ("ring", "ulysses"))
    return dist.device_mesh.init_device_mesh(kind, shape, mesh_dim_names=names)


def around(model: Any, run: Callable[..., Any]) -> Callable[..., Any]:
    """``run``, which calls ``model``, for lengths of any kind.

    What cannot be shared evenly is shared unevenly, on GPUs, by diffusers' ``ulysses_anything`` or ``ring_anything``:
    slower, since ranks tell each other sizes in each layer, so for the calls that need it only. Where that does not
    exist (both degrees together, and gloo, which gathers nothing uneven) each rank computes the whole. No message has
    passed when diffusers finds that a length is uneven, and all ranks find it alike.
    """
    sharing: Sharing | None = model.__dict__.get("_steploom_sharing")
    if sharing is None:
        return run

    def shared(*args: Any, **kwargs: Any) -> Any:
        try:
            return run(*args, **kwargs)
        except AssertionError as error:
            if _UNEVEN not in str(error):
                raise
        if sharing.unevenly is None:
            return sharing.whole(*args, **kwargs)
        setattr(sharing.config, sharing.unevenly, True)
        try:
            return run(*args, **kwargs)
        finally:
            setattr(sharing.config, sharing.unevenly, False)

    return shared


class Sharing(NamedTuple):
    """How a model shares its forwards.

    Attributes:
        config: diffusers' own, at which its layers look in each call.
        whole: The same model, which shares nothing but its weights.
        unevenly: The attribute of ``config`` for lengths that cannot be shared evenly; None if there is no such way.
    """

    config: Any
    whole: Any
    unevenly: str | None


def _whole(model: Any) -> Any:
    """A structural clone over the same weights, whose attention will not be told of other ranks."""
    clone = clone_tree(model)
    for part in clone.modules():
        if "processor" in part.__dict__:
            part.processor = copy.copy(part.processor)
    return clone
