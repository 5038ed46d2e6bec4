"""What ``steploom doctor`` looks at beside the packages: settings, devices, executors. Imports torch when called."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import os
import pkgutil
import platform
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from steploom.cli import arguments
from steploom.config import EngineConfig
from steploom.errors import ConfigError, SteploomError

if TYPE_CHECKING:
    from steploom.protocol import PipelineInfo

T = TypeVar("T")
State = Literal["ok", "absent", "broken"]
MEANINGS = {"mp": "a worker process", "inproc": "a thread"}
"""The executors that need nothing else."""

_SHORT = {"distributed_executor_backend": "executor", "worker_extension": "extension"}
SMALL = 256
"""Pixels, at most, of either side of what is drawn with a model of the user's own."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report: what was looked at, how it is, and what to know or do about it."""

    state: State
    name: str
    detail: str


def reason(error: BaseException) -> str:
    """What an error says, in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, SteploomError) else f"{type(error).__name__}: {text}"


def attempt(call: Callable[[], T]) -> tuple[T | None, str | None]:
    """What ``call`` returns, or else why it failed: the boundary of whatever `steploom doctor` tries.

    What it tries may be anybody's: damaged packages, classes of the user's, executors. Its failure is the finding, and
    so is its wish to end the process.
    """
    try:
        return call(), None
    except (Exception, SystemExit) as error:  # noqa: BLE001 - recorded: it becomes the finding
        return None, reason(error)


def read_settings() -> EngineConfig | Finding:
    """The settings of the environment, or why they cannot be read."""
    try:
        return EngineConfig.from_env()
    except SteploomError as error:
        return Finding("broken", "settings", f"{error}; correct or unset that variable")


def settings(config: EngineConfig) -> Iterator[Finding]:
    """A finding for each setting that an engine resolves when it starts, and for those that are not honoured yet."""
    for field, check in _CHECKS.items():
        value = getattr(config, field)
        variable = f"STEPLOOM_{field.upper()}"
        name = _SHORT.get(field, field)
        about, fault = attempt(functools.partial(check, config))
        if fault is not None:
            yield Finding("broken", f"setting {name}", f"{fault}; correct or unset {variable}")
        elif value is not None:
            whence = f" ({variable})" if variable in os.environ else ""
            yield Finding("ok", f"setting {name}", f"{value}{about}{whence}")
    from steploom.worker.models import loading

    try:
        loading.refuse_settings(config, given=False)
    except ConfigError as error:
        yield Finding("broken", "settings", f"{error} (or unset its STEPLOOM_ variable)")


def _model(config: EngineConfig) -> str:
    try:
        found = arguments.model(config.model)
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"model={error}") from None
    if found == "demo":
        return ", the built-in model"
    from steploom.worker.models import sources

    kinds = {"folder": ", a folder", "file": ", a single-file checkpoint", "factory": ", a factory, not called here"}
    return kinds.get(sources.find(found).kind, ", taken for a hub id, which is not looked up here")


def _task(config: EngineConfig) -> str:
    from steploom.weave import untyped

    if config.task is not None and config.task not in untyped.TASKS:
        raise ConfigError(f"task={config.task!r}: one of {', '.join(untyped.TASKS)}")
    return ""


def _device(config: EngineConfig) -> str:
    import torch

    from steploom.worker.models import loading

    device = loading.resolve_device(config.device)
    torch.zeros(1, device=device).item()
    return f": {device}" if str(device) != config.device else ""


def _executor(config: EngineConfig) -> str:
    from steploom.executor import resolve_executor

    kind = resolve_executor(config)
    if config.distributed_executor_backend in MEANINGS:
        kind(config)  # ours do nothing when they are made, but refuse settings
    if config.distributed_executor_backend == "ray":
        from steploom.executor.ray_cluster import import_ray

        import_ray()
    return f", {MEANINGS.get(str(config.distributed_executor_backend), kind.__name__)}"


def _scheduler(config: EngineConfig) -> str:
    from steploom.sched import build_scheduler

    return f", {type(build_scheduler(dataclasses.replace(config, policy='fcfs'))).__name__}"


def _policy(config: EngineConfig) -> str:
    from steploom.sched import build_scheduler

    build_scheduler(dataclasses.replace(config, scheduler="step"))
    return ""


def _worker_extension(config: EngineConfig) -> str:
    if config.worker_extension is not None:
        pkgutil.resolve_name(config.worker_extension)
    return ""


_CHECKS: dict[str, Callable[[EngineConfig], str]] = {
    "model": _model,
    "task": _task,
    "device": _device,
    "distributed_executor_backend": _executor,
    "scheduler": _scheduler,
    "policy": _policy,
    "worker_extension": _worker_extension,
}
"""How each of these settings is resolved: what there is to say beside its value, or an exception."""


def devices() -> Iterator[Finding]:
    """What torch can compute on."""
    torch: Any = importlib.import_module("torch")
    yield Finding("ok", "cpu", f"{torch.get_num_threads()} threads, {platform.machine()}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            memory = f"{about.total_memory / 2**30:.0f} GiB, compute capability {about.major}.{about.minor}"
            yield Finding("ok", f"cuda:{index}", f"{about.name}, {memory}")
    elif torch.version.cuda is not None:
        yield Finding(
            "absent", "cuda", f"torch is built for CUDA {torch.version.cuda} but finds no usable GPU or driver"
        )
    else:
        yield Finding("absent", "cuda", "this build of torch is for the CPU")
    if torch.backends.mps.is_available():
        yield Finding("ok", "mps", "Apple GPU")


def executors(config: EngineConfig, not_tried: str | None) -> Iterator[Finding]:
    """Whether each executor gives an image under ``config``; why not to try is ``not_tried``, if that is not None."""
    chosen = str(config.distributed_executor_backend)
    for backend in dict.fromkeys([*MEANINGS, chosen]):
        meaning = MEANINGS.get(backend, "actors of a cluster" if backend == "ray" else "of your own")
        if backend == "mp" and sys.platform == "win32":
            yield Finding("absent", "executor mp", "not offered on Windows")
        elif not_tried is None:
            yield _try_executor(config, backend, meaning)
        elif backend in MEANINGS:
            yield Finding("absent", f"executor {backend}", f"{meaning}; {not_tried}")


def _try_executor(config: EngineConfig, backend: str, meaning: str) -> Finding:
    name = f"executor {backend}"
    start = time.perf_counter()
    settings = dataclasses.replace(config, distributed_executor_backend=backend)
    lacking, fault = attempt(lambda: _drawn(settings))
    if fault is not None:
        return Finding("broken", name, f"{meaning}: {fault}")
    seconds = f"{time.perf_counter() - start:.1f} s from start to end"
    if lacking:
        why = f"not drawn, since {config.model} also needs {', '.join(lacking)}: see `steploom verify`"
        return Finding("ok", name, f"{meaning}; loaded, {seconds}; {why}")
    return Finding("ok", name, f"{meaning}; drew an image, {seconds}")


def _drawn(config: EngineConfig) -> list[str]:
    """As :func:`_draw`, in a loop of its own."""
    from steploom.cli import loop, quiet

    with quiet.bars(config):
        return loop.run(_draw(config))


async def _draw(config: EngineConfig) -> list[str]:
    """Draws one small image with a new engine; returns what the pipeline needs beside a prompt, if it needs more."""
    from steploom import AsyncDiffusionEngine

    async with AsyncDiffusionEngine(config) as engine:
        lacking = [one.name for one in engine.info.parameters if one.required and one.name != "prompt"]
        if not lacking:
            await engine.generate(seed=1, **_parameters(engine.info, config))
    return lacking


def _parameters(info: PipelineInfo, config: EngineConfig) -> dict[str, Any]:
    """As little work as the pipeline lets one ask for."""
    values: dict[str, Any] = {"prompt": "a red circle on a white background"}
    values["num_inference_steps"] = min(2, config.max_steps)
    if info.default_size is not None and config.model != "demo":
        values["width"], values["height"] = (min(SMALL, side) for side in info.default_size)
    accepted = {one.name for one in info.parameters}
    return {name: value for name, value in values.items() if name in accepted}
