"""Cases: one tiny random-weight pipeline each, with three requests that differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from steploom.requests import DiffusionRequest
from steploom.weave.batching import unlike
from steploom.worker.trials import trial

SIZED = f"{unlike.UNLIKE}: encoder_hidden_states has another size"
"""The engine's reason where text has the prompt's own length."""

PROMPTS = ("a red circle", "two boats", "old house")
"""Of different lengths on purpose: families with ragged text must merge them."""

Inputs = Callable[[int], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Case:
    """One pipeline class under trial.

    Attributes:
        pipeline: Name of the class.
        family: Name of the model family, as its authors write it.
        kind: ``"text to image"``, ``"image to video"``, ...
        build: Makes the pipeline anew, the same each time.
        inputs: Arguments of request 0, 1 or 2, which should differ in what a user may vary (prompt, guidance, image).
        variant: What distinguishes this case from another of the same class.
        steps: ``num_inference_steps`` of the three requests.
        steps_name: Name of that argument; None where there is none.
        alone: How the engine's reason begins why this pipeline's calls are not merged; None if they should be.
        because: What the table says besides that, one of :mod:`conformance.claims`.
        indifferent: Arguments whose swap need not matter, with a reason.
        tolerance: Of equality.
    """

    pipeline: str
    family: str
    kind: str
    build: Callable[[], Any]
    inputs: Inputs
    variant: str = ""
    steps: tuple[int, int, int] = (3, 4, 5)
    steps_name: str | None = "num_inference_steps"
    alone: str | None = None
    because: str = ""
    indifferent: tuple[str, ...] = ()
    tolerance: float = trial.TOLERANCE

    @property
    def name(self) -> str:
        """Unique."""
        return f"{self.pipeline}-{self.variant}" if self.variant else self.pipeline

    def request(self, i: int, **changes: Any) -> DiffusionRequest:
        """Request ``i``; ``changes`` replace its arguments."""
        arguments = {"output_type": "latent", **self.inputs(i), "seed": 100 + i, **changes}
        if self.steps_name is not None:
            arguments[self.steps_name] = self.steps[i]
        return DiffusionRequest(request_id=f"r{i}", **arguments)


CASES: dict[str, Case] = {}


def case(
    pipeline: str, family: str, kind: str, inputs: Inputs, **settings: Any
) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Registers the decorated function, which builds the pipeline; ``settings`` are further fields of :class:`Case`."""

    def register(build: Callable[[], Any]) -> Callable[[], Any]:
        one = Case(pipeline, family, kind, build, inputs, **settings)
        assert one.name not in CASES, f"{one.name} is there already: give it a variant"
        CASES[one.name] = one
        return build

    return register
