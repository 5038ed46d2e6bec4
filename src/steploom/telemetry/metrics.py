"""EngineMetrics: what an engine does, for Prometheus (needs ``prometheus-client``, of the extra ``server``)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from steploom.engine.async_engine import AsyncDiffusionEngine
from steploom.errors import EngineError, RequestError, SteploomError
from steploom.protocol import PipelineInfo, RunnerOutput, SchedulerOutput, WorkerStats
from steploom.requests import DiffusionOutput, DiffusionRequest
from steploom.telemetry.lives import Life, Lives
from steploom.telemetry.outcomes import OUTCOMES, outcome_of, refusal_of
from steploom.telemetry.reasons import VOCABULARY, fold
from steploom.telemetry.tallies import REQUESTS, SECONDS, Tally

_TALLIES = {
    "request_seconds": ("Seconds from submission to output, of requests that completed", SECONDS),
    "queue_seconds": ("Seconds that requests waited before they joined", SECONDS),
    "time_to_first_preview_seconds": ("Seconds from submission to a request's first preview", SECONDS),
    "step_seconds": ("Seconds of the tick in which a request's step was done, without warm-up", SECONDS),
    "step_batch_requests": ("How many requests shared a step's denoiser calls", REQUESTS),
    "encode_seconds": (
        "Seconds of a request before its first denoiser call; shared calls count by rows",
        SECONDS,
    ),
    "decode_seconds": ("Seconds of a request after its last step; shared calls count by rows", SECONDS),
}
_COUNTERS = {
    "steps": "Steps done",
    "skipped_steps": "Of these, the steps that a request's step cache answered",
    "ticks": "Ticks executed",
    "tick_seconds": "Seconds in ticks, as the engine sees them",
    "forward_seconds": "Seconds of ticks that workers spent in module forwards",
    "warmup_seconds": "Seconds of ticks that workers spent in probing, verification, compiling and capturing",
    "requests_restarted": "Requests that a worker had lost, and that waited again",
    "worker_restarts": "How often the workers were started again, with the engine or in the place of lost ones",
}
_FAULTS = {"WorkerDied": "died", "TickTimeout": "timeout", "ProtocolError": "protocol"}
"""What workers are lost by; everything else is ``failed``."""
_OF_WORKERS = {
    "encode_cache_hits": ("cache_hits", "Text-encoder calls answered without running it"),
    "encode_cache_misses": ("cache_misses", "Text-encoder calls that could have been, and were not"),
    "adapter_loads": ("lora_loads", "LoRA adapters loaded"),
    "adapter_evictions": ("lora_evictions", "LoRA adapters dropped to make room"),
    "merged_calls": ("merged_calls", "Module calls answered by a shared forward"),
    "compilations": ("compilations", "Functions compiled for a kind of inputs"),
    "compile_seconds": ("compile_s", "Seconds of that"),
}


class EngineMetrics(Lives, Collector):
    """Counts what an engine does, and says it to Prometheus.

    ::

        metrics = EngineMetrics(engine, registry)
        engine.observers.append(metrics)

    No label holds anything that a client sends. It belongs to the engine's event loop: collect there too.

    Args:
        engine: Whom it watches, once it is among ``engine.observers``.
        registry: Where it is registered; None: nowhere.
    """

    def __init__(self, engine: AsyncDiffusionEngine, registry: CollectorRegistry | None = None) -> None:
        super().__init__()
        self._engine = engine
        self._started = engine.serves
        self._outcomes: dict[str, int] = dict.fromkeys(OUTCOMES, 0)
        self._unmerged: dict[str, int] = dict.fromkeys(VOCABULARY, 0)
        self._faults: dict[str, int] = dict.fromkeys((*_FAULTS.values(), "failed"), 0)
        self._counts: dict[str, float] = dict.fromkeys(_COUNTERS, 0)
        self._tallies = {name: Tally(bounds) for name, (_, bounds) in _TALLIES.items()}
        self._stats: list[WorkerStats] = []
        if registry is not None:
            registry.register(self)

    async def refresh(self, timeout_s: float = 0.2) -> None:
        """Asks the workers for what only they know; one that is busy for longer is as it was when last asked.

        Args:
            timeout_s: Seconds to wait for them.
        """
        if not self._engine.serves:
            return
        try:
            answers: Any = await self._engine.collective_rpc("stats", timeout=timeout_s)
        except (SteploomError, TimeoutError, NotImplementedError):
            return  # busy, dead, or of a kind that has no such numbers
        answers = cast("list[Any]", answers) if isinstance(answers, list) else [answers]
        found = [answer for answer in answers if isinstance(answer, WorkerStats)]
        self._stats = found or self._stats

    def on_start(self, info: PipelineInfo) -> None:
        """Each start but the first restarts the workers."""
        self._counts["worker_restarts"] += self._started
        self._started = True
        self._stats = []

    def on_fault(self, fault: EngineError) -> None:
        """Counts it, by its kind."""
        self._faults[_FAULTS.get(type(fault).__name__, "failed")] += 1

    def on_recovered(self, seconds: float) -> None:
        """Counts it. What the new worker counts begins at 0."""
        self._counts["worker_restarts"] += 1
        self._stats = []

    def on_refused(self, request: DiffusionRequest, error: RequestError) -> None:
        """Counts it."""
        self._outcomes[refusal_of(error)] += 1

    def on_tick(self, output: SchedulerOutput, result: RunnerOutput, began: float, ended: float) -> None:
        """Counts it, and the steps in it."""
        counts = self._counts
        counts["ticks"] += 1
        counts["tick_seconds"] += ended - began
        counts["forward_seconds"] += result.forward_s
        counts["warmup_seconds"] += result.warmup_s
        for reason, calls in result.alone.items():
            self._unmerged[fold(reason)] += calls
        self._count(result, began, ended)
        super().on_tick(output, result, began, ended)

    def _count(self, result: RunnerOutput, began: float, ended: float) -> None:
        """Counts the steps of a tick, at once where they are alike, and looks for first previews."""
        runs, steps = self._runs, 0
        shared: dict[float, int] = {}
        for report in result.reports:
            life = runs.get(report.run_id)
            if life is None:
                continue
            if report.stepped:
                steps += 1
                self._counts["skipped_steps"] += report.skipped_steps - life.skipped
                mates = report.batch_requests
                shared[mates] = shared.get(mates, 0) + 1
            if report.preview is not None and not life.previewed:
                life.previewed = True
                self._tallies["time_to_first_preview_seconds"].add(ended - life.submitted)
        if steps:
            self._counts["steps"] += steps
            self._tallies["step_seconds"].add(max(0.0, ended - began - result.warmup_s), steps)
            for mates, times in shared.items():
                if mates:
                    self._tallies["step_batch_requests"].add(mates, times)

    def passed(self, life: Life, phase: str, began: float, ended: float) -> None:
        """Counts the wait of those that joined."""
        if phase == "queued" and life.phase != "queued" and not life.attempt:
            self._tallies["queue_seconds"].add(ended - began)

    def lost(self, life: Life, at: float) -> None:
        """Counts it."""
        self._counts["requests_restarted"] += 1

    def gone(self, life: Life, output: DiffusionOutput | None, error: SteploomError | None, at: float) -> None:
        """Counts it, and where its time went."""
        self._outcomes[outcome_of(error)] += 1
        if output is not None:
            for name in ("encode", "decode"):
                self._tallies[f"{name}_seconds"].add(getattr(output.timings, f"{name}_s"))
            self._tallies["request_seconds"].add(output.timings.total_s)

    def collect(self) -> Iterator[Metric]:
        """Every metric, as Prometheus' client wants it."""
        yield _gauge("requests_running", "Requests that a worker holds", self._engine.num_running)
        yield _gauge("requests_waiting", "Requests that wait for a worker", self._engine.num_waiting)
        yield _gauge("queue_limit", "Requests that may wait", self._engine.config.max_waiting)
        yield _labelled("requests", "Requests by outcome", "outcome", self._outcomes)
        yield _gauge("recovering", "Whether a worker is being replaced", self._engine.recovering is not None)
        states = self._engine.workers
        family = GaugeMetricFamily("steploom_workers", "Workers, by what they do", labels=("state",))
        for state in ("serves", "recovering", "leaving"):
            family.add_metric((state,), states.count(state))
        yield family
        yield _labelled("worker_faults", "Workers that were lost, by what they were lost by", "fault", self._faults)
        about = "Module calls that ran alone although others could have shared, by reason"
        yield _labelled("unmerged_calls", about, "reason", self._unmerged)
        for name, about in _COUNTERS.items():
            yield CounterMetricFamily(f"steploom_{name}", about, value=self._counts[name])
        for name, (about, _) in _TALLIES.items():
            tally = self._tallies[name]
            yield HistogramMetricFamily(f"steploom_{name}", about, buckets=tally.buckets, sum_value=tally.total)
        yield from self._of_workers()

    def _of_workers(self) -> Iterator[Metric]:
        for name, (field, about) in _OF_WORKERS.items():
            total = sum(getattr(stats, field) for stats in self._stats)
            yield CounterMetricFamily(f"steploom_{name}", about, value=total)
        adapters = max((len(stats.loras) for stats in self._stats), default=0)
        yield _gauge("adapters_loaded", "LoRA adapters that are loaded", adapters)
        held = sum(stats.cache_bytes for stats in self._stats)
        yield _gauge("encode_cache_bytes", "What the cache of text-encoder results holds", held)
        graphs = {what: sum(stats.graphs.get(what, 0) for stats in self._stats) for what in ("captures", "replays")}
        for what, total in graphs.items():
            yield CounterMetricFamily(f"steploom_graph_{what}", f"CUDA graphs: {what}", value=total)
        held = sum(stats.graphs.get("bytes", 0) for stats in self._stats)
        yield _gauge("graph_bytes", "Device memory that CUDA graphs hold", held)
        memory = GaugeMetricFamily(
            "steploom_memory_bytes",
            "Memory of workers: of the process (host) and on its device",
            labels=("worker", "kind"),
        )
        for rank, stats in enumerate(self._stats):
            for kind, size in stats.memory.items():
                memory.add_metric((str(rank), kind), size)
        yield memory


def _gauge(name: str, about: str, value: float) -> Metric:
    return GaugeMetricFamily(f"steploom_{name}", about, value=value)


def _labelled(name: str, about: str, label: str, values: dict[str, int]) -> Metric:
    family = CounterMetricFamily(f"steploom_{name}", about, labels=(label,))
    for value, count in values.items():
        family.add_metric((value,), count)
    return family
