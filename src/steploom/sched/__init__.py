"""Schedulers: pure, synchronous decisions about who runs in which tick. No torch, no asyncio, no time of their own."""

from __future__ import annotations

import pkgutil
import time
from typing import TypeVar

from steploom.config import EngineConfig
from steploom.errors import ConfigError
from steploom.sched.base_scheduler import BaseScheduler
from steploom.sched.cost_model import CostModel
from steploom.sched.curve import Cost
from steploom.sched.deadline import Deadline
from steploom.sched.fcfs import Fcfs
from steploom.sched.fleet import Fleet, Member
from steploom.sched.interface import SchedulerInterface
from steploom.sched.policy import Batch, Policy
from steploom.sched.ranked import Ranked
from steploom.sched.request_scheduler import RequestScheduler
from steploom.sched.srpt import Srpt
from steploom.sched.state import Clock, RequestState
from steploom.sched.step_scheduler import StepScheduler

__all__ = [
    "BaseScheduler",
    "Batch",
    "Clock",
    "Cost",
    "CostModel",
    "Deadline",
    "Fcfs",
    "Fleet",
    "Member",
    "Policy",
    "Ranked",
    "RequestScheduler",
    "RequestState",
    "SchedulerInterface",
    "Srpt",
    "StepScheduler",
    "build_scheduler",
]

SCHEDULERS: dict[str, type[SchedulerInterface]] = {"step": StepScheduler, "request": RequestScheduler}
POLICIES: dict[str, type[Policy]] = {"deadline": Deadline, "fcfs": Fcfs, "srpt": Srpt}

_T = TypeVar("_T")


def build_scheduler(config: EngineConfig, clock: Clock = time.monotonic) -> SchedulerInterface:
    """The scheduler that ``config.scheduler`` and ``config.policy`` name.

    Raises:
        ConfigError: A name cannot be resolved, or names something else.
    """
    scheduler = _resolve("scheduler", config.scheduler, SCHEDULERS, SchedulerInterface)
    policy = _resolve("policy", config.policy, POLICIES, Policy)
    return scheduler(config, policy(config, clock), clock)


def _resolve(field: str, value: str | type, known: dict[str, type[_T]], base: type[_T]) -> type[_T]:
    """A class from a short name, ``"pkg.module.Class"``, or the class itself."""
    found: object = known.get(value, value) if isinstance(value, str) else value
    if isinstance(found, str):
        try:
            found = pkgutil.resolve_name(found)
        except (ImportError, AttributeError, ValueError) as error:
            names = ", ".join(known)
            raise ConfigError(
                f"{field}={value!r}: give one of {names}, a class, or 'pkg.module.Class' ({error})"
            ) from None
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(f"{field}={value!r}: must be a subclass of {base.__module__}.{base.__name__}")
    return found
