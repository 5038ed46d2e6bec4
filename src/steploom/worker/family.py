"""A family: the pipelines that do different tasks with the same components, made as diffusers makes them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec
from torch import nn

from steploom.config import EngineConfig
from steploom.errors import ConfigError
from steploom.protocol import PipelineInfo
from steploom.weave import untyped
from steploom.weave.modules import rebinding
from steploom.worker import tasks
from steploom.worker.models import loading, mixed_dtypes, roles

log = logging.getLogger(__name__)


class Given(NamedTuple):
    """A pipeline that the application has loaded, and a ControlNet (or several) for its family."""

    pipeline: Any
    controlnet: Any


class Family:
    """One pipeline and its siblings over the same components.

    Siblings are made when the family is, so that the engine can check requests for them; that takes milliseconds, and
    no weights. They hold the user's modules as they are; noise schedulers are copies, since some classes correct the
    settings of those that they get. The user's pipeline is never changed.

    Args:
        pipeline: The user's pipeline.
        config: Of the engine.
        controlnet: For pipelines with a ControlNet; None takes ``config.controlnet``, else the pipeline's own.
        in_process: Whether the pipeline is the application's.

    Attributes:
        info: The pipeline, with the tasks of the family.

    Raises:
        ConfigError: There is a ControlNet and no pipeline of the family takes it; or dtypes do not go together.
    """

    def __init__(
        self, pipeline: Any, config: EngineConfig, *, controlnet: Any = None, in_process: bool = False
    ) -> None:
        self._dtypes = _dtypes(pipeline) if isinstance(config.dtype, Mapping) else {}
        if config.task is not None:
            mixed_dtypes.refuse(type(pipeline), config.dtype, self._dtypes)
        self.pipeline = pipeline
        self._in_process = in_process
        self._task = config.task
        self._asked = config.controlnet is not None or controlnet is not None
        if controlnet is None and config.controlnet is not None:
            controlnet = load_controlnet(config.controlnet, pipeline, local_files_only=config.local_files_only)
        self.controlnet = getattr(pipeline, "controlnet", None) if controlnet is None else controlnet
        own = tasks.own_tasks(type(pipeline))
        self.info = self.info_of(
            pipeline, own[0] if len(own) == 1 and own[0] in ("image-to-image", "inpainting", "image-to-video") else ""
        )
        self._make()

    def _make(self) -> None:
        """Makes the siblings anew, and the list of tasks."""
        self._components = untyped.components_of(self.pipeline)
        self._members: dict[str, Any] = {type(self.pipeline).__name__: self.pipeline}
        self.info.tasks = {}
        controlled: list[PipelineInfo] = []
        for task, cls in self._classes():
            member = self._member(cls)
            if member is None:
                continue
            info = self.info_of(member, task)
            self.info.tasks.setdefault(task, []).append(info)
            if tasks.Kind.of(cls.__name__).control:
                controlled.append(info)
        if self._task is not None:
            self.info.tasks.setdefault(self._task, [self.info_of(self.pipeline, self._task)])
        if controlled:
            self.info.tasks[tasks.CONTROLNET] = controlled
        elif self._asked:
            raise ConfigError(
                f"controlnet: no pipeline of diffusers takes it with {type(self.pipeline).__name__}'s model"
            )

    def _classes(self) -> list[tuple[str, type]]:
        cls = type(self.pipeline)
        control = ""
        if self.controlnet is not None:
            union = "Union" in type(self.controlnet).__name__
            control = tasks.Kind.of(cls.__name__).control or ("ControlNetUnion" if union else "ControlNet")
        found = tasks.siblings(cls, control)
        return [
            (task, other)
            for task, other in found
            if tasks.fits(other, self.pipeline, self.controlnet)
            and (other is cls or mixed_dtypes.fails(other, self._dtypes) is None)
        ]

    def _member(self, cls: type) -> Any:
        """The pipeline of a class of the family, None where diffusers cannot make it of these components."""
        if cls.__name__ in self._members:
            return self._members[cls.__name__]
        components = {
            name: rebinding.unsettled(value) if untyped.is_noise_scheduler(value) else value
            for name, value in self._components.items()
        }
        if self.controlnet is not None:
            components["controlnet"] = self.controlnet
        try:
            member = untyped.sibling(cls, components, self.pipeline)
        except Exception as fault:  # noqa: BLE001 - whatever a class of diffusers raises: then the task is not there
            log.debug("%s is not to be had of %s: %s", cls.__name__, type(self.pipeline).__name__, fault)
            return None
        made = getattr(member, "controlnet", None)
        if isinstance(made, nn.Module):  # several are wrapped into one module, which all siblings have to share
            self.controlnet = made
        self._members[cls.__name__] = member
        return member

    def info_of(self, member: Any, task: str) -> PipelineInfo:
        """What a sibling accepts, and what it needs for ``task``."""
        info = loading.describe(member, in_process=self._in_process)
        needed = tasks.needed(type(member), task)
        parameters = [
            msgspec.structs.replace(one, required=one.required or one.name in needed) for one in info.parameters
        ]
        return msgspec.structs.replace(info, parameters=parameters)

    def member(self, class_name: str) -> Any:
        """The pipeline of that class, over the components that the user's pipeline has now."""
        if class_name != type(self.pipeline).__name__:
            now = untyped.components_of(self.pipeline)
            before = self._components
            if now.keys() != before.keys() or any(now[name] is not before[name] for name in now):
                self._make()
        return self._members[class_name]

    @property
    def additional(self) -> dict[str, nn.Module]:
        """The modules that siblings have besides those of the user's pipeline."""
        known = untyped.modules_of(self.pipeline).values()
        net = self.controlnet
        return {"controlnet": net} if isinstance(net, nn.Module) and all(net is not one for one in known) else {}

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The modules of all siblings by name."""
        return {**untyped.modules_of(self.pipeline), **self.additional}


def _dtypes(pipeline: Any) -> dict[str, Any]:
    """By component."""
    return {name: part.dtype for name, part in untyped.modules_of(pipeline).items() if hasattr(part, "dtype")}


def load_controlnet(name: str, pipeline: Any, *, local_files_only: bool = False) -> Any:
    """The ControlNet in a folder, or of a hub id, where the pipeline's own modules are and in their dtype.

    Raises:
        ConfigError: It cannot be loaded, or is none.
    """
    denoiser = loading.denoiser_of(pipeline)
    try:
        net = untyped.load_component(name, getattr(denoiser, "dtype", None), local_files_only=local_files_only)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"controlnet={name!r}: cannot be loaded ({error}); give a folder that save_pretrained wrote, or a hub id"
        ) from None
    if roles.of(type(net)) != roles.CONTROLNET:
        raise ConfigError(f"controlnet={name!r}: {roles.told(type(net))}; give one of a ControlNet")
    return net.to(pipeline._execution_device).eval()
