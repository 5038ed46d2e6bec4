"""What a worker counts."""

from __future__ import annotations

import msgspec


class WorkerStats(msgspec.Struct, kw_only=True):
    """Counters of a worker since its start (``collective_rpc("stats")``).

    Attributes:
        ticks: Ticks executed.
        tick_s: Seconds in ticks.
        forward_s: Of these, inside module forwards (encoders, denoisers and VAEs).
        warmup_s: Of these, in probing, verification, compiling and capturing.
        gap_s: Seconds between two ticks, while programs were resident.
        idle_s: Of these, the worker waited for the engine.
        resident: Programs held now.
        merged_calls: Module calls answered by a shared forward.
        alone_calls: Module calls executed alone, by reason (``"only one"``, ``"verification failed: ..."``).
        cache_hits: Text-encoder calls answered from the cache, or by another's result of the same tick.
        cache_misses: Text-encoder calls that could have been, and were not.
        cache_bytes: What the cache holds now; at most ``EngineConfig.encode_cache_bytes``.
        kinds: Verified kinds of merge, with their state.
        loras: The LoRA adapters that are loaded, as they were asked for; least recently used first.
        lora_loads: How many were loaded.
        lora_evictions: How many were dropped to make room.
        memory: Bytes by kind: ``"host"`` (resident memory of the worker's process, where the system says it), and on
            CUDA ``"device_allocated"`` and ``"device_reserved"``.
        compilations: What ``torch.compile`` has compiled: functions for kinds of inputs.
        compile_s: Seconds spent on that, at the start and since.
        uncompiled: Why something runs uncompiled although it was to be compiled; None if nothing does.
        graphs: CUDA graphs and forwards: ``"held"``, ``"bytes"``, ``"captures"``, ``"replays"``, ``"evictions"``; empty
            without ``EngineConfig.cuda_graphs``.
    """

    ticks: int = 0
    tick_s: float = 0.0
    forward_s: float = 0.0
    warmup_s: float = 0.0
    gap_s: float = 0.0
    idle_s: float = 0.0
    resident: int = 0
    merged_calls: int = 0
    alone_calls: dict[str, int] = {}
    cache_hits: int = 0
    cache_misses: int = 0
    cache_bytes: int = 0
    kinds: dict[str, str] = {}
    loras: list[str] = []
    lora_loads: int = 0
    lora_evictions: int = 0
    memory: dict[str, int] = {}
    compilations: int = 0
    compile_s: float = 0.0
    uncompiled: str | None = None
    graphs: dict[str, int] = {}
