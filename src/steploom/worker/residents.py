"""Residents: the requests that a worker holds, and what it reports of them after a tick."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any, cast

import numpy as np
import torch

from steploom.errors import GenerationFailed
from steploom.protocol import PipelineInfo, RequestReport
from steploom.requests import DiffusionRequest
from steploom.weave.previews import preview
from steploom.weave.previews.preview import Previewer
from steploom.weave.program import Program
from steploom.weave.transcript import Transcript
from steploom.worker.blame.fault import failure
from steploom.worker.traits import products

log = logging.getLogger(__name__)


class Resident:
    """A request whose program lives in this worker.

    Args:
        run_id: Which attempt at which request.
        request: As it came.
        program: Its suspended pipeline call.
        previewer: Makes its previews, if it wants some.
        info: What its pipeline makes.
        check_finite: It fails if its latents do not stay finite, or its output is not.
    """

    def __init__(
        self,
        run_id: str,
        request: DiffusionRequest,
        program: Program,
        previewer: Previewer,
        info: PipelineInfo,
        *,
        check_finite: bool = False,
    ) -> None:
        self.run_id = run_id
        self.request = request
        self.program = program
        self._trajectory: list[tuple[Any, Any]] = []
        self._previewer = previewer
        self._info = info
        self._check_finite = check_finite
        self._picture: torch.Tensor | None = None
        self._told: str | None = None  # The batch key of which its bytes were told.
        if request.preview_every:
            program.witness = self._see
        if check_finite:
            program.watcher.parts, program.decoded = [], []

    def _see(self) -> None:
        """Takes the picture of a step: after its last one the program goes on within the same tick."""
        due = self.program.steps % self.request.preview_every == 0
        self._picture = self._previewer.picture(self.program) if due else None

    def report(self) -> RequestReport:
        """What the tick that just ended did for this request. What cannot be reported is this request's failure."""
        try:
            return self._report()
        except Exception as fault:  # noqa: BLE001 - the request's boundary
            return RequestReport(run_id=self.run_id, phase="done", finished=True, error=failure(fault))

    def _report(self) -> RequestReport:
        program = self.program
        seconds = program.take_seconds()
        shared = program.shared_with
        report = RequestReport(
            run_id=self.run_id,
            phase=program.phase,
            stage=program.watcher.stage,
            step=program.steps,
            total_steps=program.watcher.total_steps,
            batch_key=program.batch_key,
            batch_requests=sum(shared) / len(shared) if shared else 0,
            rows=program.rows,
            skipped_steps=program.skipped_steps,
            aside=program.aside,
            encode_s=seconds["encode"],
            denoise_s=seconds["denoise"],
            decode_s=seconds["decode"],
        )
        if report.batch_key != self._told:
            self._told, report.held_bytes = report.batch_key, program.holdings.nbytes
        if self._check_finite:
            self._refuse_broken(report)
        if program.step_end is not None:
            self._report_step(report)
        if program.done:
            self._report_end(report)
        if program.watcher.transcript is not None and report.error is None:
            self._report_text(report, program.watcher.transcript)
        return report

    def _report_step(self, report: RequestReport) -> None:
        end, request = self.program.step_end, self.request
        assert end is not None
        report.stepped, report.sigma = True, end.sigma
        if request.latents_every and report.step % request.latents_every == 0:
            report.latents = on_host(end.latents)
        report.preview, self._picture = self._picture, None
        if request.return_trajectory:
            self._trajectory.append((on_host(end.latents), on_host(end.timestep)))

    def _refuse_broken(self, report: RequestReport) -> None:
        """Raises if what it computes is not finite. On a GPU it waits for the step, so it has to be asked for.

        A part that is stepped after the end of a step was told is looked at with the next one's, or with the output.
        So is what a VAE gave: of NaN an image processor makes a black picture.
        """
        program, end = self.program, self.program.step_end
        made, program.watcher.parts = program.watcher.parts, []
        decoded, program.decoded = program.decoded, []
        if program.error is not None:
            return
        total = "" if report.total_steps is None else f" of {report.total_steps}"
        if not finite([made, None if end is None else end.latents]):
            raise _broken(f"latents after step {report.step}{total}")
        if not finite(decoded) or (program.done and not finite(program.output)):
            raise _broken("output")

    def _report_text(self, report: RequestReport, transcript: Transcript) -> None:
        """What was settled of a language model's text, and what is likely. What cannot be decoded is not streamed."""
        every = self.request.draft_every
        try:
            texts = getattr(report.output, "texts", None)
            report.commit = transcript.commit(texts, last=report.finished)
            if report.finished and texts is None:
                report.texts = transcript.told
            if report.stepped and every and report.step % every == 0:
                report.draft = transcript.draft()
        except Exception as fault:  # noqa: BLE001 - whatever a tokenizer raises: the output is all the same
            log.warning("request %s streams no text: %s: %s", self.run_id, type(fault).__name__, fault)
            self.program.watcher.transcript = None

    def _report_end(self, report: RequestReport) -> None:
        report.finished = True
        error = self.program.error
        if error is not None:
            info = self._info.serving(self.request)
            report.error = failure(error, self.request, info, self.program)
            self.program.error = None
            return
        report.output = self.program.output
        report.frame_rate = products.asked_frame_rate(self.request) or self._info.frame_rate
        report.sampling_rate = self._info.sampling_rate
        report.generator_states = [one.get_state() for one in self.request.generators] or None
        self.program.watcher.finished(report.output)
        if self._trajectory:
            report.trajectory_latents = _stacked([latents for latents, _ in self._trajectory])
            report.trajectory_timesteps = _stacked([timestep for _, timestep in self._trajectory])


def show(reports: Iterable[RequestReport]) -> None:
    """Turns the previews of a tick's reports into images: all of them are under way on the device by now."""
    for report in reports:
        if report.preview is not None:
            report.preview = preview.on_host(report.preview)


def _broken(what: str) -> GenerationFailed:
    return GenerationFailed(
        f"check_finite=True: NaN or Inf in the {what}; try another dtype (float16 overflows where bfloat16 does not), "
        "or other arguments"
    )


def finite(value: Any) -> bool:
    """Whether all numbers of tensors and arrays are, in whatever they are."""
    if isinstance(value, np.ndarray):
        return not np.issubdtype(value.dtype, np.inexact) or bool(np.isfinite(value).all())
    if isinstance(value, torch.Tensor):
        return not (value.is_floating_point() or value.is_complex()) or bool(value.isfinite().all())
    if isinstance(value, Mapping):
        return all(map(finite, cast("Mapping[Any, Any]", value).values()))
    return not isinstance(value, (list, tuple)) or all(map(finite, cast("list[Any]", value)))


def _stacked(values: list[Any]) -> Any:
    """One tensor over all steps; the list itself where shapes change on the way or values are no numbers."""
    if any(not isinstance(value, (int, float, torch.Tensor)) for value in values):
        return values
    tensors = [torch.as_tensor(value) for value in values]
    return torch.stack(tensors) if len({tensor.shape for tensor in tensors}) == 1 else values


def on_host(value: Any) -> Any:
    """A copy of a tensor on the CPU, safe from updates in place."""
    return value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value
