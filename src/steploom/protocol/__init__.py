"""What engine and workers say to each other, whatever carries it.

Plain structs. Tensors, arrays and images stand in them as they are; :mod:`steploom.codec` moves them out of band.
A request is known to a worker by its *run id*: the request id and the attempt number, so that a replay is never taken
for a late answer of an earlier attempt.
"""

from __future__ import annotations

from typing import Any

import msgspec

from steploom import errors
from steploom.protocol.pipeline import TASK_ALIASES as TASK_ALIASES
from steploom.protocol.pipeline import Parameter as Parameter
from steploom.protocol.pipeline import PipelineInfo as PipelineInfo
from steploom.protocol.stats import WorkerStats as WorkerStats
from steploom.requests import DiffusionRequest

PROTOCOL_VERSION = 1


def run_id(request_id: str, attempt: int) -> str:
    """The id under which a worker knows one attempt at a request."""
    return f"{request_id}#{attempt}"


def request_id_of(run: str) -> str:
    """The request id in a run id."""
    return run.rpartition("#")[0]


class ErrorInfo(msgspec.Struct, frozen=True):
    """An exception as text.

    ``kind`` is the name of a class of :mod:`steploom.errors`; any other exception travels as ``GenerationFailed``.
    """

    kind: str
    message: str
    traceback: str = ""
    field: str | None = None
    retry_after_s: float | None = None
    drained: bool = False

    @classmethod
    def of(cls, error: BaseException, traceback: str = "") -> ErrorInfo:
        """Describes ``error``; keeps no reference to it or its frames."""
        kind = type(error).__name__ if isinstance(error, errors.SteploomError) else "GenerationFailed"
        own = isinstance(error, errors.SteploomError)
        text = errors.words_of(error)
        message = text if own else f"{type(error).__name__}: {text}"
        field = getattr(error, "field", None) if own else None
        after = error.retry_after_s if isinstance(error, errors.QueueFull) else None
        drained = isinstance(error, errors.RequestCancelled) and bool(error.drained)
        return cls(kind, message, errors.told(traceback), field, None if after is None else float(after), drained)

    def exception(self) -> errors.SteploomError:
        """The exception to raise on this side."""
        if self.kind == "InvalidRequest":
            return errors.InvalidRequest(self.message, field=self.field)
        if self.kind == "QueueFull":
            return errors.QueueFull(self.message, retry_after_s=self.retry_after_s)
        if self.kind == "RequestCancelled":
            return errors.RequestCancelled(self.message, drained=self.drained)
        kind = getattr(errors, self.kind, None)
        if isinstance(kind, type) and issubclass(kind, errors.RequestError) and kind is not errors.GenerationFailed:
            return kind(self.message)
        if isinstance(kind, type) and issubclass(kind, errors.EngineError):
            return errors.EngineError(self.message) if kind is errors.WorkerDied else kind(self.message)
        if kind is errors.ConfigError:
            return errors.ConfigError(self.message)
        return errors.GenerationFailed(self.message, remote_traceback=self.traceback)


class NewRequest(msgspec.Struct, frozen=True):
    """A request that joins: its full payload."""

    run_id: str
    request: DiffusionRequest


class SchedulerOutput(msgspec.Struct, frozen=True):
    """One tick's decision; or, with the number of a tick that was sent already, what is added to it (an amendment).

    Attributes:
        tick: Number of the tick, from 1.
        scheduled_new_reqs: Requests that join, with everything that a worker needs to know.
        scheduled_cached_reqs: Run ids of resident requests that step; their latents live in the worker.
        finished_req_ids: Run ids that the workers may forget: finished, failed or aborted since the last tick.
        batch_key: What the scheduled requests have in common, None if unknown.
        worker: The rank of the worker that executes it; each has ticks of its own.
    """

    tick: int
    scheduled_new_reqs: list[NewRequest] = []
    scheduled_cached_reqs: list[str] = []
    finished_req_ids: list[str] = []
    batch_key: str | None = None
    worker: int = 0

    @property
    def run_ids(self) -> list[str]:
        """All scheduled run ids, cached ones first (they came first)."""
        return [*self.scheduled_cached_reqs, *(new.run_id for new in self.scheduled_new_reqs)]

    def amended(self, amendment: SchedulerOutput) -> SchedulerOutput:
        """The tick with what ``amendment`` adds; whom that ends is no member any more, even if it was to join."""
        gone = amendment.finished_req_ids
        cached = [run for run in self.scheduled_cached_reqs if run not in gone]
        new = [one for one in self.scheduled_new_reqs if one.run_id not in gone]
        key = self.batch_key if cached or new else amendment.batch_key
        cached, new = cached + amendment.scheduled_cached_reqs, new + amendment.scheduled_new_reqs
        return SchedulerOutput(self.tick, new, cached, self.finished_req_ids + gone, key, self.worker)


class TextRows(msgspec.Struct, frozen=True):
    """A piece of text, and the ids of its tokens, for each row; ``texts`` is None if the pipeline has no tokenizer.

    ``prompt_tokens`` come before it in each row, if that is known; ``ended``: each row has come to its end token.
    """

    texts: list[str] | None
    tokens: list[list[int]]
    prompt_tokens: int | None = None
    ended: bool = False


class RequestReport(msgspec.Struct, kw_only=True):
    """What one tick did for one request.

    Attributes:
        run_id: Which attempt at which request.
        phase: Where the program stands now: ``"encode"``, ``"denoise"``, ``"decode"``, ``"done"``.
        stage: Name of the loop that it is in; empty while the worker has no place for it.
        stepped: Whether this tick ended a step (a tick may advance a request by zero steps).
        step: Steps done so far.
        total_steps: Steps in all, if known.
        sigma: Noise level after the step.
        batch_key: The observed batch key: what its denoiser call must share to be merged.
        batch_requests: How many requests shared its denoiser calls of this tick, on average; 0 if it made none.
        rows: Rows that it brought to that call.
        held_bytes: Bytes that it keeps between steps, of its denoiser calls; told when its batch key is new, else 0.
        skipped_steps: Of its steps so far, those that its step cache has answered.
        aside: Whether it waits for a text encoder or a VAE that runs beside the ticks: it needs no place in a batch.
        encode_s: Seconds since its last report before its first denoiser call, waiting included.
        denoise_s: Likewise in its loop.
        decode_s: Likewise after its loop.
        latents: Latents after the step, if streamed in this tick.
        preview: PIL image, if streamed in this tick.
        draft: Of a language model: what is likely to follow its text so far.
        commit: Of a language model: what its text has grown by for good.
        finished: The program is done: ``output`` or ``error`` is set.
        output: What the pipeline returned.
        trajectory_latents: ``[steps, rows, ...]``, if asked for.
        trajectory_timesteps: ``[steps]``, if asked for.
        frame_rate: Frames per second of the output, where known.
        sampling_rate: Samples per second of the output, where known.
        texts: A language model's text, per row, where its output has only tokens.
        generator_states: State after the last draw, uint8 ``[bytes]``, of each generator that the request was given.
        error: Why the program ended without output.
        unserved: Whether ``error`` is that of an executor of whole requests, and no pipeline's.
    """

    run_id: str
    phase: str = "encode"
    stage: str = "denoise"
    stepped: bool = False
    step: int = 0
    total_steps: int | None = None
    sigma: float | None = None
    batch_key: str | None = None
    batch_requests: float = 0.0
    rows: int = 0
    held_bytes: int = 0
    skipped_steps: int = 0
    aside: bool = False
    encode_s: float = 0.0
    denoise_s: float = 0.0
    decode_s: float = 0.0
    latents: Any = None
    preview: Any = None
    draft: TextRows | None = None
    commit: TextRows | None = None
    finished: bool = False
    output: Any = None
    trajectory_latents: Any = None
    trajectory_timesteps: Any = None
    frame_rate: float | None = None
    sampling_rate: int | None = None
    texts: list[str] | None = None
    generator_states: Any = None
    error: ErrorInfo | None = None
    unserved: bool = False


class RunnerOutput(msgspec.Struct, kw_only=True):
    """A worker's answer to one tick.

    Attributes:
        tick: The tick that it answers.
        reports: One per scheduled request that the worker holds, and one for each that is aside.
        seconds: Wall time of the tick in the worker.
        forward_s: Of these, inside module forwards (encoders, denoisers and VAEs).
        chores_s: Of these, in module forwards before and after the requests' loops: text encoders and VAEs.
        warmup_s: Of these, in probing, verification, compiling and capturing (excluded from figures and from
            ``tick_timeout_s``).
        too_many_rows: The fewest rows of which a denoiser's forward ran out of memory in this tick; 0 if none did.
        peak_bytes: Device memory that the tick took at its peak beyond what was taken before it; 0 if nobody can say.
        room_bytes: Memory that there is for requests and their forwards, with what residents hold already; 0 if nobody
            can say, and in most ticks, since it is looked up now and then.
        alone: Denoiser calls that ran alone although others could have shared, by reason, in this tick.
        amendments: How many amendments of the tick had arrived when it began. Later ones act in the next tick.
        gap_s: Seconds since the end of the tick before, without RPCs; 0 if no program was resident meanwhile.
        idle_s: Of these, the worker waited for the engine.
    """

    tick: int
    reports: list[RequestReport] = []
    seconds: float = 0.0
    forward_s: float = 0.0
    chores_s: float = 0.0
    warmup_s: float = 0.0
    too_many_rows: int = 0
    peak_bytes: int = 0
    room_bytes: int = 0
    alone: dict[str, int] = {}
    amendments: int = 0
    gap_s: float = 0.0
    idle_s: float = 0.0
