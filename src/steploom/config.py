"""EngineConfig: every setting of an engine, frozen, resolved once.

This module is the only reader of environment variables.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Mapping, MutableMapping
from types import NoneType
from typing import Any, Literal, Protocol, cast, get_args

from steploom import step_caches
from steploom.errors import ConfigError, InvalidRequest

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
OffloadLevel = Literal["leaf_level", "block_level"]
AsideMode = Literal["auto", "thread", "slices", "off"]
Compiler = Mapping[str, Any]
"""Arguments of ``torch.compile``: ``mode``, ``backend``, ``dynamic``, ``fullgraph``, ``options``; and ``regional``."""

_CHOICES = {"Dtype": get_args(Dtype), "OffloadLevel": get_args(OffloadLevel), "AsideMode": get_args(AsideMode)}

_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "str": ((str,), "a str that is not empty"),
    "int": ((int,), "an integer"),
    "float": ((int, float), "a number of seconds greater than 0"),
    "bool": ((bool,), "True or False"),
    "type": ((type,), "a class"),
    "None": ((NoneType,), "None"),
    "Mapping[str, str]": ((Mapping,), "a mapping of names to files, folders or hub ids"),
    "Mapping[str, Any]": ((Mapping,), "a mapping by name"),
    "Compiler": ((Mapping,), "a mapping of torch.compile's arguments"),
    "QuantizationConfig": ((), "a quantization config of diffusers"),
    **{name: ((str,), f"one of {', '.join(map(repr, values))}") for name, values in _CHOICES.items()},
}
"""What the fields' annotations mean, and how a message says it."""

_LEAST = {"max_retries": 0, "encode_cache_bytes": 0, "compile_cache_bytes": 0}
"""The least that an integer may be, where that is not 1."""

_COMPILER: dict[Any, tuple[tuple[type, ...], str]] = {
    "mode": ((str,), "a mode of torch.compile"),
    "backend": ((str,), "a backend of torch.compile"),
    "dynamic": ((bool, NoneType), "True, False or None"),
    "fullgraph": ((bool,), "True or False"),
    "options": ((dict,), "a mapping of the backend's options"),
    "regional": ((bool,), "True or False"),
}
"""The arguments of ``compile``, and what they may be."""

_MOST = 2**63 - 1
"""The greatest integer that reaches a worker."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of an engine.

    Attributes:
        model: ``"demo"`` (the built-in model), a folder in diffusers layout, a hub id (``"owner/name"``), a single-file
            checkpoint (its path or address), or ``"pkg.module:factory"``, called in the worker, for a pipeline.
        base_model: Folder or hub id, in diffusers layout, of what a single-file checkpoint does not hold.
        components: Other components by name: a folder, hub id or single file each, or None to leave one out
            (``{"transformer": "flux-Q4_K.gguf", "safety_checker": None}``).
        task: Auto-pipeline task to load the model for (``"text-to-image"``); None takes the model's own class.
        controlnet: Folder or hub id of a ControlNet for requests with ``task="controlnet"``.
        dtype: ``"auto"`` is bfloat16 on CUDA and float32 on CPU (for the models' weights); or by component:
            ``{"vae": "float32", "default": "bfloat16"}``.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``.
        variant: Which weights of a folder or hub id, by the middle of their file names (``"fp16"``).
        revision: Branch, tag or commit of a hub id.
        local_files_only: Take from the hub only what is in its cache already.
        trust_remote_code: Run Python code that a model's folder or hub id brings along.
        quantization_config: As diffusers takes it: a config object (alone it is for the denoisers), or a mapping of
            ``PipelineQuantizationConfig``'s arguments.
        group_offload: Keep weights off the device and bring them there in groups: ``"leaf_level"``,
            ``"block_level"``, or a mapping of ``enable_group_offload``'s arguments.
        vae_tiling: Decode large images tile by tile.
        vae_slicing: Decode the images of a batch one after the other.
        distributed_executor_backend: ``"mp"`` (a worker process), ``"inproc"`` (a thread), ``"ray"``, a subclass of
            :class:`steploom.executor.DiffusionExecutor`, or its name as ``"pkg.module.Class"``.
        scheduler: ``"step"`` (requests join between denoising steps), ``"request"`` (one request to completion), or a
            subclass of :class:`steploom.sched.SchedulerInterface`, or its name.
        policy: Order and batch choice; ``"fcfs"``, or a :class:`steploom.sched.Policy` class or its name.
        run_ahead: Decide and send a tick while the one before it runs, so that the worker never waits for the engine.
        aside: Where text encoders and VAEs run while others' steps go on: on a ``"thread"`` (on CUDA, and a stream), in
            ``"slices"`` of the ticks, or all at once in a tick (``"off"``); ``"auto"`` by whether a core is to spare.
        max_batch: Requests that share one tick, at most.
        max_resident: Requests whose latents are held by a worker, at most. None: twice ``max_batch``.
        max_waiting: Requests that wait, at most; one more raises :class:`~steploom.errors.QueueFull`.
        data_parallel_size: Number of workers.
        batch_invariant: Pad merged forwards to a fixed number of rows, so that results do not depend on company.
        compile: Compile the denoisers' repeated blocks, or a denoiser that names none as a whole; or a mapping of
            ``torch.compile``'s ``mode``, ``backend``, ``dynamic``, ``fullgraph`` and ``options``, and of ``regional``
            (False: as a whole).
        max_compilations: What a worker compiles, at most: functions for kinds of inputs. What would need more of it
            runs uncompiled.
        compile_cache_bytes: Bytes of compiled code that are kept on disk for the next start; 0 leaves it to torch,
            which keeps it in a temporary folder without bounds.
        cuda_graphs: Capture merged forwards as CUDA graphs.
        max_cuda_graphs: CUDA graphs that a worker holds, at most.
        cuda_graph_bytes: Bytes of device memory that they hold, at most.
        attention_backend: As diffusers names them (``"flash"``, ``"_native_math"``); None leaves the model's own.
        worker_extension: ``"pkg.module.Class"`` whose methods run in the worker via ``collective_rpc``.
        start_timeout_s: Seconds that loading the model may take.
        tick_timeout_s: Seconds that one tick may take (warm-up and verification do not count).
        max_retries: How often a request is to be replayed after its worker died. Not in this version: it fails with
            :class:`~steploom.errors.WorkerDied`.
        max_steps: Upper bound on ``num_inference_steps`` of a request.
        max_pixels: Upper bound on ``width * height`` of a request.
        max_images: Upper bound on the images or videos of a request: prompts times ``num_images_per_prompt``.
        max_frames: Upper bound on the frames of a request, those of all its videos together.
        preview_vae: A tiny autoencoder for previews: a folder or hub id of diffusers' ``AutoencoderTiny``; None shows
            them by a linear map that is fitted from the model's own VAE.
        encode_cache_bytes: Bytes of text-encoder outputs kept for identical calls; 0 keeps none.
        loras: Names under which requests may ask for LoRA adapters, and the file, folder or hub id of each. (A request
            may also give these themselves.) As a variable: ``STEPLOOM_LORAS=ink=./ink.safetensors,oil=./oil``.
        cache: Step cache of requests that do not say (``DiffusionRequest.cache``): ``"easycache"`` or
            ``"easycache:0.1"``, its threshold; None skips no step.
        max_loras: Adapters that a worker keeps loaded, at most; those that its resident requests use always stay.
        torch_threads: CPU threads of a worker; None leaves torch's own choice.
    """

    model: str = "demo"
    base_model: str | None = None
    components: Mapping[str, Any] | None = dataclasses.field(default=None, hash=False)
    task: str | None = None
    controlnet: str | None = None
    dtype: Dtype | Mapping[str, Any] = dataclasses.field(default="auto", hash=False)
    device: str = "auto"
    variant: str | None = None
    revision: str | None = None
    local_files_only: bool = False
    trust_remote_code: bool = False
    quantization_config: Mapping[str, Any] | QuantizationConfig | None = dataclasses.field(default=None, hash=False)
    group_offload: OffloadLevel | Mapping[str, Any] | None = dataclasses.field(default=None, hash=False)
    vae_tiling: bool = False
    vae_slicing: bool = False
    distributed_executor_backend: str | type = "mp"
    scheduler: str | type = "step"
    policy: str | type = "fcfs"
    run_ahead: bool = True
    aside: AsideMode = "off"
    max_batch: int = 16
    max_resident: int | None = None
    max_waiting: int = 1024
    data_parallel_size: int = 1
    batch_invariant: bool = False
    compile: Compiler | bool = dataclasses.field(default=False, hash=False)
    max_compilations: int = 64
    compile_cache_bytes: int = 4 * 2**30
    cuda_graphs: bool = False
    max_cuda_graphs: int = 64
    cuda_graph_bytes: int = 4 * 2**30
    attention_backend: str | None = None
    worker_extension: str | None = None
    start_timeout_s: float = 600.0
    tick_timeout_s: float = 300.0
    max_retries: int = 2
    max_steps: int = 1000
    max_pixels: int = 4096 * 4096
    max_images: int = 64
    max_frames: int = 2048
    encode_cache_bytes: int = 64 * 1024 * 1024
    preview_vae: str | None = None
    loras: Mapping[str, str] | None = dataclasses.field(default=None, hash=False)
    max_loras: int = 8
    cache: str | None = None
    torch_threads: int | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _plain(field.name, getattr(self, field.name)))
            _check(field, getattr(self, field.name))
        _check_entries(self)
        try:
            step_caches.parse(self.cache)
        except InvalidRequest as error:
            raise ConfigError(str(error)) from None
        reasons = {"compile": "compiled code does not see weights that come and go",
                   "cuda_graphs": "a graph replays on the memory where the weights were"}  # fmt: skip
        for name, why in reasons.items():
            if getattr(self, name) and self.group_offload is not None:
                both = f"group_offload={self.group_offload!r} with {name}={getattr(self, name)!r}"
                raise ConfigError(f"{both}: {why}; leave one of them out")
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
                values[field.name] = _parse(field, raw)
        return cls(**{**values, **overrides})


class QuantizationConfig(Protocol):
    """A quantization config of diffusers or transformers, or a ``PipelineQuantizationConfig`` (a mapping of them)."""

    quant_method: Any


def _is_quantization(value: object) -> bool:
    return not isinstance(value, type) and (hasattr(value, "quant_method") or hasattr(value, "quant_mapping"))


def _plain(name: str, value: Any) -> Any:
    """``value`` without what only says the same in other types: paths, torch's dtypes and devices."""
    if name == "compile" and isinstance(value, Mapping):
        return dict(cast("Mapping[Any, Any]", value)) or True
    if name in ("model", "base_model") and isinstance(value, os.PathLike):
        return os.fspath(cast("os.PathLike[str]", value))
    if name in ("dtype", "device") and (type(value).__module__, type(value).__name__) == ("torch", name):
        return str(value).removeprefix("torch.")
    if name in ("dtype", "components") and isinstance(value, Mapping):
        entries = cast("Mapping[Any, Any]", value)
        return {key: _plain("dtype" if name == "dtype" else "model", entry) for key, entry in entries.items()}
    return value


def _check(field: dataclasses.Field[Any], value: Any) -> None:
    """Refuses a value that is not of its field's type, or out of bounds.

    Raises:
        ConfigError: It names the field, the value and what would do.
    """
    names = str(field.type).split(" | ")
    kinds = [kind for name in names for kind in _KINDS[name][0]]
    # bool is a subclass of int, and True is not what anybody means by 1.
    fits = isinstance(value, tuple(kinds)) and (bool in kinds or not isinstance(value, bool))
    fits = fits or ("QuantizationConfig" in names and _is_quantization(value))
    least = _LEAST.get(field.name, 1)
    if fits and isinstance(value, str):
        fits = bool(value) and all(value in _CHOICES[name] for name in names if name in _CHOICES)
    elif fits and isinstance(value, (int, float)) and bool not in kinds:
        fits = value > 0 if "float" in names else value >= least
        fits = fits and (isinstance(value, float) or value <= _MOST)
    if fits and "Mapping[str, str]" in names and isinstance(value, Mapping):
        entries = cast("Mapping[Any, Any]", value).items()
        fits = all(isinstance(part, str) and part for entry in entries for part in entry)
    if fits:
        return
    bounds = f" of at least {least}" + (" and below 2**63" if isinstance(value, int) and value > _MOST else "")
    meanings = [_KINDS[name][1] + (bounds if name == "int" else "") for name in names]
    raise ConfigError(f"{field.name}={value!r}: must be {' or '.join(meanings)}; the default is {field.default!r}")


def _check_entries(config: EngineConfig) -> None:
    """Refuses entries of the mappings ``dtype`` and ``components`` that mean nothing."""
    known = [name for name in _CHOICES["Dtype"] if name != "auto"]
    dtypes: Mapping[Any, Any] = config.dtype if isinstance(config.dtype, Mapping) else {}
    for name, value in dtypes.items():
        if value not in known:
            raise ConfigError(f"dtype[{name!r}]={value!r}: must be one of {', '.join(map(repr, known))}")
    compiler: Mapping[Any, Any] = config.compile if isinstance(config.compile, Mapping) else {}
    for name, value in compiler.items():
        kinds, meaning = _COMPILER.get(name, ((), ""))
        if not kinds:
            raise ConfigError(f"compile[{name!r}]={value!r}: there is no such argument; give {', '.join(_COMPILER)}")
        if not isinstance(value, kinds):
            raise ConfigError(f"compile[{name!r}]={value!r}: must be {meaning}")
    for name, value in (config.components or {}).items():
        if value is not None and not (isinstance(value, str) and value):
            raise ConfigError(
                f"components[{name!r}]={value!r}: must be a folder, a hub id or a file, or None to leave it out"
            )


def _parse(field: dataclasses.Field[Any], raw: str) -> Any:
    """``raw`` as the type of its field: what may be a mapping is one if it is written as JSON."""
    names, default = str(field.type).split(" | "), field.default
    kinds: dict[str, Callable[[str], Any]] = {"int": int, "float": float}
    meanings = {"bool": "true or false", "int": "an integer", "float": "a number"}
    meaning = meanings.get(names[-1], "name=path,name=path" if "Mapping[str, str]" in names else "a JSON object")
    try:
        if names[-1] == "bool":
            return json.loads(raw) if raw.startswith("{") else _flag(raw)
        if "Mapping[str, str]" in names and not raw.startswith("{"):
            return _entries(raw)
        if raw.startswith("{") or ("Mapping[str, Any]" in names and "str" not in names and names[0] not in _CHOICES):
            return json.loads(raw)
        return kinds.get(names[0], str)(raw)
    except (ValueError, KeyError):
        mend = f"unset it for the default, {default!r}"
        raise ConfigError(f"STEPLOOM_{field.name.upper()}={raw!r}: must be {meaning}; {mend}") from None


def _flag(raw: str) -> bool:
    return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[raw.lower()]


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


def keep_compiled_in(folder: pathlib.Path, default: str, env: MutableMapping[str, str] | None = None) -> bool:
    """Has torch keep compiled code there, unless the user says where; whether it does.

    ``default`` is torch's own folder, which it may have put into the variable by itself.
    """
    env = os.environ if env is None else env
    if env.get("TORCHINDUCTOR_CACHE_DIR") in (None, "", default):
        env["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    return env["TORCHINDUCTOR_CACHE_DIR"] == str(folder)


def cache_folder(env: Mapping[str, str] | None = None) -> pathlib.Path:
    """Where this user's programs keep what can be made again: ``$XDG_CACHE_HOME/steploom``, or its default."""
    env = os.environ if env is None else env
    given = pathlib.Path(env.get("XDG_CACHE_HOME") or "")
    return (given if given.is_absolute() else pathlib.Path.home() / ".cache") / "steploom"


def state_folder(env: Mapping[str, str] | None = None) -> pathlib.Path:
    """Where this user's programs keep what has to outlive them: ``$XDG_STATE_HOME/steploom``, or its default."""
    env = os.environ if env is None else env
    given = pathlib.Path(env.get("XDG_STATE_HOME") or "")
    return (given if given.is_absolute() else pathlib.Path.home() / ".local" / "state") / "steploom"
