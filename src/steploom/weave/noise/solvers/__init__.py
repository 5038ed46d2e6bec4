"""The steps of noise schedulers of many requests as one update of all rows.

A step of a noise scheduler is a handful of multiplications and additions with coefficients that are known beforehand.
For the common schedulers it is written down here once more, with one coefficient per row; the order of operations and
the roundings are diffusers' own, so results are bit-equal up to the last bit of a coefficient. A scheduler or setting
that is not here takes its own step, as does a request that steps alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steploom.weave.noise.solvers import ddim, dpm, euler, flow_match, unipc
from steploom.weave.noise.solvers.rows import RowStep, Solver, run

_SOLVERS: dict[tuple[str, str], Solver] = {
    ("diffusers.schedulers.scheduling_flow_match_euler_discrete", "FlowMatchEulerDiscreteScheduler"): flow_match.step,
    ("diffusers.schedulers.scheduling_euler_discrete", "EulerDiscreteScheduler"): euler.step,
    ("diffusers.schedulers.scheduling_ddim", "DDIMScheduler"): ddim.step,
    ("diffusers.schedulers.scheduling_dpmsolver_multistep", "DPMSolverMultistepScheduler"): dpm.step,
    ("diffusers.schedulers.scheduling_unipc_multistep", "UniPCMultistepScheduler"): unipc.step,
}


def row_step(kind: type, noise_scheduler: Any, arguments: Mapping[str, Any]) -> RowStep | None:
    """The step that ``noise_scheduler`` would take, to be taken with others'; None if it has to be taken by itself.

    Args:
        kind: diffusers' class; a class derived from one of its own may do something else.
        noise_scheduler: Not changed before the step is taken.
        arguments: Of its ``step``, by name.
    """
    solver = _SOLVERS.get((kind.__module__, kind.__qualname__))
    return None if solver is None else solver(noise_scheduler, arguments)


__all__ = ["RowStep", "row_step", "run"]
