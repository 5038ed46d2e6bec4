"""What ticks cost, kept in a file for the next start: one for each model, device and way of running."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import pathlib
import re
import tempfile
from typing import Any

import anyio

from steploom.config import EngineConfig, expanded, state_folder
from steploom.errors import ConfigError
from steploom.protocol import PipelineInfo
from steploom.sched import BaseScheduler, Fleet, SchedulerInterface
from steploom.threads import at_once

log = logging.getLogger(__name__)

_DECIDES = (
    "model", "base_model", "components", "task", "controlnet", "variant", "revision", "quantization_config", "dtype",
    "group_offload", "vae_tiling", "vae_slicing", "compile", "cuda_graphs", "attention_backend", "torch_threads",
    "aside", "batch_invariant", "data_parallel_size", "ulysses_degree", "ring_degree", "tensor_parallel_size",
)  # fmt: skip
"""Settings on which the cost of a tick depends."""


@dataclasses.dataclass(frozen=True)
class CostsFile:
    """A file of costs.

    Attributes:
        path: Where it is.
        owner: What the costs are of; a file of another owner is not read, and replaced.
    """

    path: pathlib.Path
    owner: dict[str, str]

    @classmethod
    def of(cls, config: EngineConfig, info: PipelineInfo) -> CostsFile | None:
        """The file that the settings name; None if they name none, or if nobody can say which model it is."""
        named = config.distributed_executor_backend in ("mp", "ray")  # else it may be any pipeline, or a pretended one
        if config.costs_file is None or (config.costs_file == "auto" and not named):
            return None
        owner = {name: str(getattr(config, name)) for name in _DECIDES}
        owner |= {"pipeline": info.pipeline_class, "device": info.device_name or info.device, "dtype": info.dtype}
        if config.costs_file != "auto":
            return cls(expanded(config.costs_file, "costs_file"), owner)
        digest = hashlib.sha256(json.dumps(owner, sort_keys=True).encode()).hexdigest()[:16]
        name = re.sub(r"[^A-Za-z0-9]+", "-", pathlib.Path(config.model).name)[:40].strip("-")
        try:
            return cls(state_folder() / "costs" / f"{name or 'model'}-{digest}.json", owner)
        except ConfigError as error:
            log.warning("costs of ticks are not kept: %s, or name a costs_file", error)
            return None

    @staticmethod
    def check(config: EngineConfig) -> None:
        """Raises:
        ConfigError: The settings name a file that is nowhere.
        """
        expanded(config.costs_file or "", "costs_file")

    def read(self) -> Any:
        """What was kept; None if there is nothing that can be used."""
        try:
            kept = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            log.warning("costs of ticks are learned anew, since %s cannot be read: %s", self.path, error)
            return None
        return kept if isinstance(kept, dict) and kept.get("owner") == self.owner else None  # pyright: ignore

    def write(self, state: dict[str, Any]) -> None:
        """Keeps ``state``, whole or not at all."""
        part = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, suffix=".part", delete=False) as file:
                part = pathlib.Path(file.name)
                json.dump({"owner": self.owner, **state}, file)
            part.replace(self.path)
        except OSError as error:
            log.warning("costs of ticks are not kept in %s: %s", self.path, error)
            if part is not None:
                with contextlib.suppress(OSError):  # a disk that refuses this as well
                    part.unlink(missing_ok=True)


def learned(scheduler: SchedulerInterface | Fleet) -> dict[str, Any] | None:
    """What the scheduler has learned; None if it learns nothing, or has learned nothing yet."""
    if not isinstance(scheduler, BaseScheduler | Fleet) or not scheduler.costs.shown():
        return None
    return {"costs": scheduler.costs.state(), "demands": scheduler.demands.state()}


def teach(scheduler: SchedulerInterface | Fleet, kept: Any) -> None:
    """Has the scheduler go on where another one was."""
    if kept is None or not isinstance(scheduler, BaseScheduler | Fleet):
        return
    if scheduler.costs.restore(kept.get("costs")):
        scheduler.demands.restore(kept.get("demands"))


async def recall(config: EngineConfig, info: PipelineInfo, scheduler: SchedulerInterface | Fleet) -> CostsFile | None:
    """Has the scheduler go on with what an earlier engine of this model has learned; where it is kept."""
    if isinstance(scheduler, BaseScheduler | Fleet):
        scheduler.costs.room_bytes = info.room_bytes
    file = CostsFile.of(config, info)
    if file is not None:
        teach(scheduler, await at_once(file.read))
    return file


async def keep(file: CostsFile | None, state: dict[str, Any] | None) -> None:
    """Writes what was learned, if anything, also if cancelled."""
    if file is not None and state is not None:
        with anyio.CancelScope(shield=True):
            await at_once(file.write, state)
