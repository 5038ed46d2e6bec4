"""EngineConfig: every setting of an engine, frozen, resolved once.

This module is the only reader of environment variables.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any

from steploom import step_caches
from steploom.config import parallel
from steploom.config.places import cache_folder as cache_folder
from steploom.config.places import expanded as expanded
from steploom.config.places import state_folder as state_folder
from steploom.config.values import (
    AUTO_BATCH,
    Auto,
    Compiler,
    OffloadLevel,
    QuantizationConfig,
    Share,
    check,
    check_entries,
    parse,
    plain,
    sizes,
)
from steploom.config.values import LONGEST_S as LONGEST_S
from steploom.config.values import AsideMode as AsideMode
from steploom.config.values import Dtype as Dtype
from steploom.errors import ConfigError, InvalidRequest


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
        distributed_executor_backend: ``"mp"`` (a worker process), ``"inproc"`` (a thread), ``"ray"`` (actors of a
            cluster), a subclass of :class:`steploom.executor.DiffusionExecutor`, or its name as ``"pkg.module.Class"``.
        ray_address: ``"HOST:PORT"`` of the Ray cluster's head; None: the cluster that this machine is a node of.
        ray_resources: What each worker asks of its node (``{"CPU": 2, "GPU": 1}``, and resources of your own); None:
            one CPU and, where the cluster has GPUs, one GPU.
        ray_placement_timeout_s: Seconds that a worker may wait for a node with that.
        ray_reach_timeout_s: Seconds that connecting to ``ray_address`` may take, or to a worker on another machine.
        ray_silence_timeout_s: Seconds for which the machine of a worker may be silent; then the worker is lost. Five
            times as often it is asked whether it is there. It cannot answer while a message of its own is on its way,
            so the largest one must arrive sooner: in 15 s, 187 MB over 100 Mbit/s.
        ray_gone_timeout_s: Seconds that Ray may take to say that a worker is gone which it was told to end.
        scheduler: ``"step"`` (requests join between denoising steps), ``"request"`` (one request to completion), or a
            subclass of :class:`steploom.sched.SchedulerInterface`, or its name.
        policy: Who runs next: ``"deadline"`` (the earliest that can be kept), ``"srpt"`` (the shortest rest),
            ``"fcfs"`` (first come, first served), or a :class:`steploom.sched.Policy` class or its name.
        preempt: Let requests pause at a step for more urgent ones, where they can afford it.
        priority_ageing_s: Seconds after which a waiting request rises to the next class of ``priority``.
        user_weights: Shares of users (``DiffusionRequest.user``) where they differ from 1. As a variable:
            ``STEPLOOM_USER_WEIGHTS=ann=2,bob=0.5``.
        run_ahead: Decide and send a tick while the one before it runs, so that the worker never waits for the engine.
        aside: Where text encoders and VAEs run while others' steps go on: on a ``"thread"`` (on CUDA, and a stream), in
            ``"slices"`` of the ticks, or all at once in a tick (``"off"``); ``"auto"`` by whether a core is to spare.
        max_batch: Requests that share one tick, at most; ``"auto"``: up to the rows beyond which another one only makes
            everybody late, as measured for each shape.
        max_resident: Requests whose latents are held by a worker, at most. None: twice ``max_batch``.
        memory_share: Share of the memory that there is for requests which they may fill, as measured: those for whom it
            is too little wait. None: nothing is measured, and there is no bound.
        max_waiting: Requests that wait, at most; one more raises :class:`~steploom.errors.QueueFull`.
        max_waiting_s: Seconds of work that waits, at most, as estimated; more raises ``QueueFull``. None: no bound.
        refuse_hopeless: Refuse a request at once that cannot be done within its ``timeout``, as estimated.
        profile: Sizes whose ticks are measured at the start, by 1, 2, 4... requests, unless costs are kept already:
            ``"512x512,1024x1024"``.
        costs_file: Where what ticks cost is kept for the next start; ``"auto"``: a file for this model and device among
            the user's states; None keeps nothing.
        data_parallel_size: Number of worker processes, which serve one queue; of several GPUs each has one.
        ulysses_degree: Ranks (processes, of several GPUs each with one) that make up one worker and share each forward
            of its transformer, by diffusers' Ulysses attention: each has a part of the sequence.
        ring_degree: The same by ring attention; both together make ``ulysses_degree * ring_degree`` ranks.
        tensor_parallel_size: Ranks that make up one worker, each with a part of the transformer's weights.
        ranks_meet_timeout_s: Seconds that ranks which have loaded may take to find each other.
        ranks_agree_timeout_s: Seconds within which all ranks have to fail at a forward at which one has failed.
        batch_invariant: Fill merged forwards up, beyond ``max_batch`` requests, so that a request's bits do not depend
            on its company. A request for whose forward of that size there is no memory fails.
        check_finite: A request in whose latents NaN or Inf comes up fails at that step, alone (for LTX-2's sound at the
            next one), and one in whose output they do at its end. Without it the pipeline goes on, as diffusers' own
            does, and may give a black image.
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
        start_timeout_s: Seconds that loading the model may take; also that sleeping, or waking up, may.
        tick_timeout_s: Seconds that one tick may take (warm-up and verification do not count).
        call_timeout_s: Seconds that a call of ``collective_rpc`` without ``timeout`` may take when its turn has come;
            then the worker is replaced, as if a tick had taken too long.
        stop_timeout_s: Seconds that a worker which is told to end may take, its tick included; then a process gets
            SIGTERM, and a thread is left to itself. None: 5 for a process; 30 for a thread, which cannot be killed.
            Rank 0 gives the other ranks three fifths of that.
        kill_timeout_s: Seconds that a worker process may take after SIGTERM; then it is killed.
        last_words_timeout_s: Seconds for which the last words of a worker that has ended may be on their way, or the
            news that it has. Before it ends it waits for twice as long until they have left.
        hub_timeout_s: Seconds that the hub may take to say where an adapter is, while the requests that run wait.
        max_message_bytes: Bytes of a message between the engine and a worker, at most: the requests that join in one
            tick, or what one tick has made. What would be more is refused, and fails alone.
        max_retries: How often a request is replayed, with all others, whose worker died with it in a tick; 0 fails it
            at once. After that those that ran are told apart (:class:`steploom.sched.quarantine.Quarantine`). Also how
            many starts of a worker may fail in a row while it is replaced.
        restart_backoff_s: Seconds before a worker is started again whose predecessor was started again, too, and has
            answered no tick; each time twice as many, up to ``max_restart_backoff_s``.
        max_restart_backoff_s: Seconds that it waits at most.
        max_steps: Upper bound on ``num_inference_steps`` of a request, and on the steps that its pipeline makes of
            them, those of all windows of a video together; of a language model, on those of each block, of a cascade on
            those of each stage.
        max_pixels: Upper bound on width times height of every image of a request, those that it brings and those that
            are made.
        max_images: Upper bound on the images or videos of a request: prompts times ``num_images_per_prompt``. Also on
            the texts of a language model, and on the pictures of one argument.
        max_frames: Upper bound on the frames of a request, those of all its videos together. Also on those that one
            argument brings.
        max_sound_s: Upper bound on the seconds of sound of a request, those of all its waveforms, or videos, together.
        max_tokens: Upper bound on the tokens of each text that a language model writes (``gen_length``), and of its
            blocks; each block takes ``num_inference_steps`` at most. Also on what a request fills its prompts up to
            (``max_sequence_length``), and on what is written for them (``max_new_tokens``).
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
    ray_address: str | None = None
    ray_resources: Mapping[str, float] | None = dataclasses.field(default=None, hash=False)
    ray_placement_timeout_s: float = 60.0
    ray_reach_timeout_s: float = 15.0
    ray_silence_timeout_s: float = 15.0
    ray_gone_timeout_s: float = 5.0
    scheduler: str | type = "step"
    policy: str | type = "deadline"
    preempt: bool = False
    priority_ageing_s: float = 60.0
    user_weights: Mapping[str, float] | None = dataclasses.field(default=None, hash=False)
    run_ahead: bool = True
    aside: AsideMode = "off"
    max_batch: int | Auto = 16
    max_resident: int | None = None
    memory_share: Share | None = 0.9
    max_waiting: int = 1024
    max_waiting_s: float | None = None
    refuse_hopeless: bool = False
    profile: str | None = None
    costs_file: str | None = "auto"
    data_parallel_size: int = 1
    ulysses_degree: int = 1
    ring_degree: int = 1
    tensor_parallel_size: int = 1
    ranks_meet_timeout_s: float = 120.0
    ranks_agree_timeout_s: float = 10.0
    batch_invariant: bool = False
    check_finite: bool = False
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
    call_timeout_s: float = 600.0
    stop_timeout_s: float | None = None
    kill_timeout_s: float = 2.0
    last_words_timeout_s: float = 1.0
    hub_timeout_s: float = 10.0
    max_message_bytes: int = 4 * 2**30
    max_retries: int = 2
    restart_backoff_s: float = 0.5
    max_restart_backoff_s: float = 30.0
    max_steps: int = 1000
    max_pixels: int = 4096 * 4096
    max_images: int = 64
    max_frames: int = 2048
    max_sound_s: float = 3600.0
    max_tokens: int = 4096
    encode_cache_bytes: int = 64 * 1024 * 1024
    preview_vae: str | None = None
    loras: Mapping[str, str] | None = dataclasses.field(default=None, hash=False)
    max_loras: int = 8
    cache: str | None = None
    torch_threads: int | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, plain(field.name, getattr(self, field.name)))
            check(field, getattr(self, field.name))
        sizes(self.profile or "")
        check_entries(self.dtype, self.compile, self.components)
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
        if self.max_resident is not None and self.max_batch != "auto" and self.max_resident < self.max_batch:
            raise ConfigError(
                f"max_resident={self.max_resident}: must be at least max_batch={self.max_batch}, "
                "since every request of a batch is resident; raise it, or leave it None"
            )
        if self.batch_invariant and self.max_batch == "auto":
            raise ConfigError(
                "max_batch='auto' with batch_invariant=True: every forward would be filled up to the most that 'auto' "
                "allows; give max_batch the number of requests that you expect at once"
            )
        parallel.refuse(self)

    @property
    def ranks(self) -> int:
        """Processes that make up one worker."""
        return self.ulysses_degree * self.ring_degree * self.tensor_parallel_size

    @property
    def process_stop_s(self) -> float:
        """Seconds that a process which is told to end may take: ``stop_timeout_s``, else 5."""
        return 5.0 if self.stop_timeout_s is None else self.stop_timeout_s

    @functools.cached_property
    def batch_limit(self) -> int:
        """Requests of a tick at most, whatever its cost."""
        if self.max_batch != "auto":
            return self.max_batch
        return AUTO_BATCH if self.max_resident is None else min(AUTO_BATCH, self.max_resident)

    @functools.cached_property
    def resident_limit(self) -> int:
        """Requests held by a worker at most: ``max_resident``, else twice ``max_batch``."""
        return self.max_resident if self.max_resident is not None else 2 * self.batch_limit

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
                values[field.name] = parse(field, raw)
        return cls(**{**values, **overrides})


def worker_environment(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment that a worker process inherits, as a plain copy."""
    return dict(os.environ if env is None else env)


def keep_to_this_machine(env: MutableMapping[str, str] | None = None) -> None:
    """Has ranks that talk by gloo or NCCL use the loopback interface, unless the user says otherwise."""
    env = os.environ if env is None else env
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        env.setdefault(name, "lo0" if sys.platform == "darwin" else "lo")


def keep_compiled_in(folder: pathlib.Path, default: str, env: MutableMapping[str, str] | None = None) -> bool:
    """Has torch keep compiled code there, unless the user says where; whether it does.

    ``default`` is torch's own folder, which it may have put into the variable by itself.
    """
    env = os.environ if env is None else env
    if env.get("TORCHINDUCTOR_CACHE_DIR") in (None, "", default):
        env["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    return env["TORCHINDUCTOR_CACHE_DIR"] == str(folder)
