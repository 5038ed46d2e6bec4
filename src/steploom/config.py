"""EngineConfig: every setting of an engine, frozen, resolved once.

This module is the only reader of environment variables.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from types import NoneType
from typing import Any, Literal, cast, get_args

from steploom.errors import ConfigError

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "str": ((str,), "a str that is not empty"),
    "int": ((int,), "an integer"),
    "float": ((int, float), "a number of seconds greater than 0"),
    "bool": ((bool,), "True or False"),
    "type": ((type,), "a class"),
    "None": ((NoneType,), "None"),
    "Mapping[str, str]": ((Mapping,), "a mapping of names to files, folders or hub ids"),
    "Dtype": ((str,), f"one of {', '.join(map(repr, get_args(Dtype)))}"),
}
"""What the fields' annotations mean, and how a message says it."""

_LEAST = {"max_retries": 0}
"""The least that an integer may be, where that is not 1."""

_MOST = 2**63 - 1
"""The greatest integer that reaches a worker."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of an engine.

    Attributes:
        model: ``"demo"`` (the built-in model), a folder in diffusers layout, or a hub id.
        task: Auto-pipeline task to load the model for (``"text-to-image"``); None takes the model's own class.
        dtype: ``"auto"`` is bfloat16 on CUDA and float32 on CPU (for the models' weights).
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``.
        distributed_executor_backend: ``"mp"`` (a worker process), ``"inproc"`` (a thread), ``"ray"``, a subclass of
            :class:`steploom.executor.DiffusionExecutor`, or its name as ``"pkg.module.Class"``.
        scheduler: ``"step"`` (requests join between denoising steps), ``"request"`` (one request to completion), or a
            subclass of :class:`steploom.sched.SchedulerInterface`, or its name.
        policy: Order and batch choice; ``"fcfs"``, or a :class:`steploom.sched.Policy` class or its name.
        max_batch: Requests that share one tick, at most.
        max_resident: Requests whose latents are held by a worker, at most. None: twice ``max_batch``.
        max_waiting: Requests that wait, at most; one more raises :class:`~steploom.errors.QueueFull`.
        data_parallel_size: Number of workers.
        batch_invariant: Pad merged forwards to a fixed number of rows, so that results do not depend on company.
        compile: Compile the denoisers.
        cuda_graphs: Capture merged forwards as CUDA graphs.
        attention_backend: As diffusers names them; None leaves the model's own.
        worker_extension: ``"pkg.module.Class"`` whose methods run in the worker via ``collective_rpc``.
        start_timeout_s: Seconds that loading the model may take.
        tick_timeout_s: Seconds that one tick may take (warm-up and verification do not count).
        max_retries: How often a request is replayed after its worker died.
        max_steps: Upper bound on ``num_inference_steps`` of a request.
        max_pixels: Upper bound on ``width * height`` of a request.
        encode_cache_bytes: Bytes of text-encoder outputs kept for identical calls.
        loras: Names under which requests may ask for LoRA adapters, and the file, folder or hub id of each. (A request
            may also give these themselves.) As a variable: ``STEPLOOM_LORAS=ink=./ink.safetensors,oil=./oil``.
        max_loras: Adapters that a worker keeps loaded, at most; those that its resident requests use always stay.
        torch_threads: CPU threads of a worker; None leaves torch's own choice.
    """

    model: str = "demo"
    task: str | None = None
    dtype: Dtype = "auto"
    device: str = "auto"
    distributed_executor_backend: str | type = "mp"
    scheduler: str | type = "step"
    policy: str | type = "fcfs"
    max_batch: int = 16
    max_resident: int | None = None
    max_waiting: int = 1024
    data_parallel_size: int = 1
    batch_invariant: bool = False
    compile: bool = False
    cuda_graphs: bool = False
    attention_backend: str | None = None
    worker_extension: str | None = None
    start_timeout_s: float = 600.0
    tick_timeout_s: float = 300.0
    max_retries: int = 2
    max_steps: int = 1000
    max_pixels: int = 4096 * 4096
    encode_cache_bytes: int = 64 * 1024 * 1024
    loras: Mapping[str, str] | None = None
    max_loras: int = 8
    torch_threads: int | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check(field, getattr(self, field.name))
        if self.max_resident is not None and self.max_resident < self.max_batch:
            raise ConfigError(
                f"max_resident={self.max_resident}: must be at least max_batch={self.max_batch}, "
                "since every request of a batch is resident; raise it, or leave it None"
            )

    @property
    def resident_limit(self) -> int:
        """Requests held by a worker at most: ``max_resident``, else twice ``max_batch``."""
        return self.max_resident if self.max_resident is not None else 2 * self.max_batch

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None, **overrides: Any) -> EngineConfig:
        """Reads ``STEPLOOM_<FIELD>`` variables (``STEPLOOM_MAX_BATCH=8``); ``overrides`` win.

        Raises:
            ConfigError: A variable does not parse, or its value is out of range.
        """
        env = os.environ if env is None else env
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            raw = env.get(f"STEPLOOM_{field.name.upper()}")
            if raw is not None:
                values[field.name] = _parse(field.name, raw, field.default)
        return cls(**{**values, **overrides})


def _check(field: dataclasses.Field[Any], value: Any) -> None:
    """Refuses a value that is not of its field's type, or out of bounds.

    Raises:
        ConfigError: It names the field, the value and what would do.
    """
    names = str(field.type).split(" | ")
    kinds = [kind for name in names for kind in _KINDS[name][0]]
    # bool is a subclass of int, and True is not what anybody means by 1.
    fits = isinstance(value, tuple(kinds)) and (bool in kinds or not isinstance(value, bool))
    least = _LEAST.get(field.name, 1)
    if fits and isinstance(value, str):
        fits = bool(value) and ("Dtype" not in names or value in get_args(Dtype))
    elif fits and isinstance(value, (int, float)) and bool not in kinds:
        fits = value > 0 if "float" in names else value >= least
        fits = fits and (isinstance(value, float) or value <= _MOST)
    if fits and isinstance(value, Mapping):
        entries = cast("Mapping[Any, Any]", value).items()
        fits = all(isinstance(part, str) and part for entry in entries for part in entry)
    if fits:
        return
    bounds = f" of at least {least}" + (" and below 2**63" if isinstance(value, int) and value > _MOST else "")
    meanings = [_KINDS[name][1] + (bounds if name == "int" else "") for name in names]
    raise ConfigError(f"{field.name}={value!r}: must be {' or '.join(meanings)}; the default is {field.default!r}")


def _parse(name: str, raw: str, default: object) -> Any:
    """``raw`` as the type of the field's default (None's are given by their use)."""
    kinds: dict[str, type] = {"max_resident": int, "torch_threads": int}
    kind = kinds.get(name, str if default is None else type(default))
    meaning = {bool: "true or false", int: "an integer", float: "a number"}.get(kind, "text")
    meaning = "name=path,name=path" if name == "loras" else meaning
    try:
        if kind is bool:
            return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[raw.lower()]
        return _entries(raw) if name == "loras" else kind(raw)
    except (ValueError, KeyError):
        mend = f"unset it for the default, {default!r}"
        raise ConfigError(f"STEPLOOM_{name.upper()}={raw!r}: must be {meaning}; {mend}") from None


def _entries(raw: str) -> dict[str, str]:
    """``name=path,name=path`` as a mapping."""
    entries: dict[str, str] = {}
    for entry in raw.split(","):
        name, place = entry.split("=", 1)
        entries[name.strip()] = place.strip()
    return entries


def worker_environment(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment that a worker process inherits, as a plain copy."""
    return dict(os.environ if env is None else env)
