"""The runner executes ticks inside a worker: it starts, resumes and ends programs, and reports what became of them.

Its decisions depend on the messages alone, so that all ranks of a group decide alike; ``aside`` alone goes by a clock.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from steploom import lora, step_caches
from steploom.config import EngineConfig
from steploom.config.parallel import asked
from steploom.errors import ConfigError, EngineError
from steploom.protocol import NewRequest, PipelineInfo, RequestReport, RunnerOutput, SchedulerOutput, WorkerStats
from steploom.requests import DiffusionRequest
from steploom.weave import signatures
from steploom.weave.counters import Counters
from steploom.weave.forwards.step_cache import StepCache
from steploom.weave.hub import Hub
from steploom.weave.lora.selections import Selection
from steploom.weave.pipelines import Loom
from steploom.weave.previews.preview import Previewer, load_tiny
from steploom.weave.program import Program
from steploom.weave.watching import Watcher
from steploom.worker import memory
from steploom.worker.arguments import arguments
from steploom.worker.beside import make_aside
from steploom.worker.blame.fault import failure, no_steps
from steploom.worker.bounds import RequestBounds
from steploom.worker.family import Family, Given
from steploom.worker.gauges import gauge_of
from steploom.worker.lora.loras import Counts, Loras
from steploom.worker.models import loading
from steploom.worker.residents import Resident, show
from steploom.worker.rpc import Extensions
from steploom.worker.trials.probes import doubled, samples
from steploom.worker.tuning import Tuning
from steploom.worker.warmup import warm_up


class Runner:
    """Executes the scheduler's decisions on one pipeline. Everything on the thread that constructs it.

    Attributes:
        info: What the pipeline accepts.
        pipeline: The user's pipeline, for worker extensions; None while asleep at level 2.
    """

    def __init__(
        self,
        pipeline: Any,
        config: EngineConfig,
        *,
        in_process: bool = False,
        reload: Callable[[], Any] | None = None,
        progress: Callable[[str], None] | None = None,
        controlnet: Any = None,
    ) -> None:
        loading.refuse_settings(config, given=in_process)
        loading.refuse(pipeline)
        if in_process:
            loading.refuse_moves(config, pipeline)
        torch.set_grad_enabled(False)
        self._in_process = in_process
        self._controlnet = controlnet
        self._config = config
        self._reload = reload
        self._tell = progress or (lambda line: None)
        self._residents: dict[str, Resident] = {}
        self._leaving: list[Resident] = []  # gone, while a call of theirs runs aside
        self._selections: dict[str, Selection] = {}
        self._lora_counts = Counts()
        self._ticks = 0
        self._homes: dict[str, Any] = {}
        self._spent = dict.fromkeys(("tick_s", "forward_s", "warmup_s"), 0.0)
        self._tuning = Tuning(config, self._tell, given=in_process)
        self._adopt(pipeline)
        self._extensions = Extensions(self, config.worker_extension)

    @classmethod
    def load(cls, config: EngineConfig, progress: Callable[[str], None] | None = None) -> Runner:
        """Loads ``config.model``; ``progress`` is told what is being done."""
        tell = progress or (lambda line: None)
        if config.torch_threads is not None:
            torch.set_num_threads(config.torch_threads)
        pipeline = loading.load(config, tell)
        runner = cls(pipeline, config, reload=lambda: loading.load(config, tell), progress=progress)
        if config.compile or config.cuda_graphs:
            warm_up(runner, config, tell)
        return runner

    @classmethod
    def from_pipeline(cls, pipeline: Any, config: EngineConfig) -> Runner:
        """Serves a pipeline that the application has; it is never modified. May be :class:`Given` with a ControlNet."""
        given = pipeline if isinstance(pipeline, Given) else Given(pipeline, None)
        loading.refuse_other(given.pipeline)
        return cls(given.pipeline, config, in_process=True, controlnet=given.controlnet)

    def _adopt(self, pipeline: Any) -> None:
        self.pipeline: Any = pipeline
        config = self._config
        self._family = Family(pipeline, config, controlnet=self._controlnet, in_process=self._in_process)
        self.info: PipelineInfo = self._family.info
        if config.ranks > 1 and self.info.no_lora is None:
            self.info.no_lora = f"{asked(config)}: adapters cannot be shared by ranks yet"
        if config.loras and self.info.no_lora is not None:
            raise ConfigError(f"loras={dict(config.loras)!r}: {self.info.no_lora}; else leave it None")
        lora.check_places(config.loras or {})
        if self.info.makes == ["text"] and step_caches.parse(config.cache) is not None:
            raise ConfigError(f"cache={config.cache!r}: no step of text is like the one before; leave it None")
        device = torch.device(getattr(pipeline, "_execution_device", "cpu"))
        self._gauge = gauge_of(device, config)
        self.info.room_bytes = self._gauge.room()
        aside, invariant = functools.partial(make_aside, config.aside, device), config.batch_invariant
        self._hub = Hub(config.encode_cache_bytes, self._tell, aside, config.batch_limit, invariant=invariant)
        self._weave()
        tiny = load_tiny(config.preview_vae, pipeline, local_files_only=config.local_files_only)
        self._previewer = Previewer(pipeline, tiny, self._hub.aside.settle)

    def _weave(self) -> None:
        """Takes up the pipeline's modules as they are now."""
        self._loom = Loom(self.pipeline, isolated=self._in_process)
        self._hub.cache.forget_modules()
        self._tuning.weave(self._loom, self._hub)
        self._loras: Loras | None = Loras(self._loom, self._config, self._lora_counts, self._tell)

    def execute(self, output: SchedulerOutput) -> RunnerOutput:
        """One tick. A request's own fault ends that request alone and is reported."""
        started = time.perf_counter()
        self._gauge.begin()
        self._ticks += 1
        for run_id in output.finished_req_ids:
            self._forget(run_id)
        named = dict.fromkeys(output.scheduled_cached_reqs)
        if output.run_ids:  # else it may only tell what to forget, and nobody waits for its answer
            named |= dict.fromkeys(run_id for run_id, one in self._residents.items() if one.program.aside)
        scheduled = [self._residents[run_id] for run_id in named if run_id in self._residents]
        reports: list[RequestReport] = []
        for new in output.scheduled_new_reqs:
            try:
                scheduled.append(self._start(new))
            except Exception as fault:  # noqa: BLE001 - the tick boundary: reported as the request's failure
                error = failure(fault, new.request)
                reports.append(RequestReport(run_id=new.run_id, finished=True, error=error))
        stepping = self._in_turn(scheduled)
        self._hub.tick([resident.program for resident in stepping], others=len(self._residents) - len(stepping))
        for resident in dict.fromkeys([*scheduled, *stepping]):
            reports.append(resident.report())
            if reports[-1].finished:
                self._forget(resident.run_id)
        self._end_leaving()
        show(reports)
        counters = self._hub.counters
        result = counters.answer(output.tick, reports, time.perf_counter() - started)
        self._gauge.end(result, self._residents.values())
        spent = {"tick_s": result.seconds, "forward_s": counters.forward_s, "warmup_s": counters.warmup_s}
        self._spent = {name: seconds + spent[name] for name, seconds in self._spent.items()}
        return result

    def _in_turn(self, scheduled: list[Resident]) -> list[Resident]:
        """Who goes on: those scheduled; the oldest alone, whoever is, where no other may begin before its end."""
        if self._loom.one_by_one is None or not scheduled:
            return scheduled
        self._hub.aside.settle()  # who leaves may hold a lock
        self._end_leaving()
        return [next(iter(self._residents.values()))]

    def _start(self, new: NewRequest) -> Resident:
        request = new.request
        if not self._residents:
            if self._loom.outdated:
                loading.refuse(self.pipeline)
                self._weave()
            self._tuning.look(self._loom)
        if request.adapters and self._loras is not None:
            self._settle_adapters()
            self._selections[new.run_id] = self._loras.take(request.adapters)
        try:
            program = self._program(new.run_id, request, lambda: self._doubled(new))
        except BaseException:
            self._give_back(new.run_id)
            raise
        caching = step_caches.parse(self._config.cache if request.cache is None else request.cache)
        if caching is not None and not program.watcher.open_ended:
            program.step_cache = StepCache(caching, self._hub.batches.settle)
        program.settle_with(self._hub.aside.settle)
        resident = self._residents[new.run_id] = Resident(
            new.run_id, request, program, self._previewer, self.info, check_finite=self._config.check_finite
        )
        return resident

    def _program(
        self,
        run_id: str,
        request: DiffusionRequest,
        doubled: Callable[[], Iterable[Program]] = tuple,
        changes: Mapping[str, Any] = MappingProxyType({}),
    ) -> Program:
        if self.pipeline is None:
            raise EngineError("the engine is asleep; call wake_up() first")
        info = self.info.serving(request)
        bounds = None if changes else RequestBounds(request, info, self._config)  # a probe has more samples
        watcher = Watcher(bounds, no_steps(request, info.shortened_by))
        member = self._family.member(info.pipeline_class)
        self._loom.adopt(self._family.additional)
        selection = self._selections.get(run_id)
        views = {} if selection is None else selection.views
        pipeline = self._loom.thread_pipeline(watcher, request.noise_scheduler, views, member)
        given = arguments(request, info, member, changes)
        watcher.follow_text(pipeline, signatures.defaults(member) | given)
        return Program(run_id, lambda: pipeline(**given), watcher, doubled, request.context, samples(request))

    def _doubled(self, new: NewRequest) -> Iterator[Program]:
        accepted = {parameter.name for parameter in self.info.serving(new.request).parameters}
        for changes in doubled(new.request, accepted) if self._loom.one_by_one is None else ():
            self._hub.aside.settle()  # it runs modules at once
            kept = {n: v for n, v in changes.items() if n in accepted and (v is not None or n in new.request.params)}
            yield self._program(new.run_id, new.request, changes=kept)

    def _forget(self, run_id: str) -> None:
        """Ends a program; one whose module call runs aside is ended once that is done."""
        resident = self._residents.pop(run_id, None)
        if resident is not None:
            self._hub.aside.drop(resident.program)
            self._leaving.append(resident)
            self._end_leaving()

    def _end_leaving(self) -> None:
        if not self._residents:  # nobody's steps wait for it
            self._hub.aside.settle()
        running, self._leaving = self._leaving, []
        for resident in running:
            if self._hub.aside.runs(resident.program):
                self._leaving.append(resident)
                continue
            resident.program.unwind()
            self._hub.forget(resident.program)
            self._give_back(resident.run_id)

    def _give_back(self, run_id: str) -> None:
        selection = self._selections.pop(run_id, None)
        if selection is not None and self._loras is not None:
            self._settle_adapters()
            self._loras.give_back(selection)

    def _settle_adapters(self) -> None:
        """Layers of adapters come and go while no module with adapters runs."""
        if self._hub.aside.adapted:
            self._hub.aside.settle()

    def call(self, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """A collective RPC, between two ticks: ``ping``, ``stats``, ``sleep``, ``wake_up``, or the extension's.

        Raises:
            InvalidRequest: There is no such method.
        """
        if method not in ("ping", "stats"):  # others may change what runs aside
            self._hub.aside.settle()
        return self._extensions.call(method, args, kwargs)

    @property
    def counters(self) -> Counters:
        """What was counted since the start."""
        return self._hub.counters

    def stats(self) -> WorkerStats:
        """Counters since the start."""
        self._hub.absorb()
        cache, loras = self._hub.cache, [] if self._loras is None else self._loras.names
        return WorkerStats(
            ticks=self._ticks, **self._spent, resident=len(self._residents), merged_calls=self.counters.merged_calls,
            alone_calls=dict(self.counters.alone_calls), cache_hits=cache.hits, cache_misses=cache.misses,
            cache_bytes=cache.bytes, kinds=self._hub.kinds, loras=loras, lora_loads=self._lora_counts.loads,
            lora_evictions=self._lora_counts.evictions, memory=memory.held(), **self._tuning.counts(),
        )  # fmt: skip

    def reset_counts(self) -> None:
        """Forgets what was counted so far but compilations and graphs: it was warm-up."""
        self.counters.forget()
        self._hub.cache.hits = self._hub.cache.misses = 0
        self._ticks, self._spent = 0, dict.fromkeys(self._spent, 0.0)

    def sleep(self, level: int = 1) -> None:
        """Frees the device: weights to host memory (level 1), or dropped and loaded again (level 2). Idempotent.

        Raises:
            EngineError: Programs are resident.
            ConfigError: The level does not exist here.
        """
        if self._residents:
            raise EngineError(f"{len(self._residents)} requests are resident; sleep waits until they are done")
        if level not in (1, 2) or (level == 2 and self._reload is None):
            raise ConfigError(f"level={level!r}: 1 (weights to host memory) or, for a model that was loaded here, 2")
        if self.pipeline is None or (self._homes and level == 1):
            return  # it sleeps already, as deeply
        self.forget_weights()
        if self._loras is not None:
            self._loras.clear()
        if level == 2:
            self._adopt_nothing()
            return
        modules = self._family.modules
        loading.refuse_sleep(modules)
        self._homes = {name: getattr(module, "device", None) for name, module in modules.items()}
        for module in modules.values():
            module.to("cpu")

    def forget_weights(self) -> None:
        """Drops what was computed from the weights: they have changed, or leave the device."""
        self._hub.cache.clear()
        self._tuning.forget()
        if self.pipeline is not None:
            self._loom.forget_conversions()
        if self._loras is not None:
            self._loras.forget_weights()

    def _adopt_nothing(self) -> None:
        del self._loom, self._previewer, self._family
        self.pipeline = self._loras = None
        self._homes = {}
        memory.still.thaw()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def wake_up(self) -> None:
        """Brings the weights back to the device."""
        if self._reload is not None and self.pipeline is None:
            self._hub.aside.close()
            self._adopt(self._reload())
            memory.still.freeze_again()
            return
        modules = self._family.modules
        for name, device in self._homes.items():
            if device is not None:
                modules[name].to(device)
        self._homes = {}

    def close(self) -> None:
        """Unwinds all programs. The pipeline is as it was, and where it was. Idempotent."""
        for run_id in list(self._residents):
            self._forget(run_id)
        self._hub.aside.close()
        if self._homes:
            self.wake_up()
