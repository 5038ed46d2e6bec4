"""Model: what a pretended model has to say, whatever it makes."""

from __future__ import annotations

from typing import Protocol

from steploom.protocol import PipelineInfo, RequestReport
from steploom.requests import DiffusionRequest


class Model(Protocol):
    """What a pretended model has to say, whatever it makes."""

    def info(self) -> PipelineInfo:
        """The pipeline, as a worker would describe it."""
        ...

    def said_to(self, request: DiffusionRequest) -> str:
        """What it was asked for, as text."""
        ...

    def total_steps(self, request: DiffusionRequest) -> int:
        """How many steps the request takes."""
        ...

    def tell(self, report: RequestReport, request: DiffusionRequest) -> None:
        """Adds to the report of a step whatever is streamed after it."""
        ...

    def finish(self, report: RequestReport, request: DiffusionRequest) -> None:
        """Adds to the report of the last step what the pipeline returns."""
        ...
