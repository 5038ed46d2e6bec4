"""The terminal event of a request whose program is done."""

from __future__ import annotations

from steploom.errors import EngineError, GenerationFailed, RequestError
from steploom.protocol import RequestReport
from steploom.requests import DiffusionOutput, Event, Failed, Finished
from steploom.sched.state import RequestState


def outcome(state: RequestState, report: RequestReport, now: float) -> Event:
    """``Finished`` with what the pipeline returned, or ``Failed`` with its error."""
    request_id = state.request_id
    if report.error is not None:
        error = report.error.exception()
        if not isinstance(error, RequestError) and not (report.unserved and isinstance(error, EngineError)):
            error = GenerationFailed(report.error.message, remote_traceback=report.error.traceback)
        return Failed(request_id=request_id, error=error)
    output = DiffusionOutput(
        request_id=request_id,
        seed=state.request.seed,
        output=report.output,
        output_type=state.request.output_type,
        timings=state.timings(now, report.skipped_steps),
        trajectory_latents=report.trajectory_latents,
        trajectory_timesteps=report.trajectory_timesteps,
        frame_rate=report.frame_rate,
        sampling_rate=report.sampling_rate,
        texts=report.texts,
        generator_states=report.generator_states,
    )
    return Finished(request_id=request_id, output=output)
