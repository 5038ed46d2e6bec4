"""What goes into the engine and what comes out: requests, events, outputs. Plain data, no torch."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import dataclasses
import operator
import os
import secrets
import uuid
from collections.abc import Callable, Mapping
from types import NoneType
from typing import Any, ClassVar, cast

import msgspec

from steploom import given, noise_schedulers, step_caches
from steploom import lora as loras
from steploom.errors import InvalidRequest, SteploomError
from steploom.media.pictures import brief
from steploom.outputs import DiffusionOutput
from steploom.outputs import Timings as Timings

SEED_BITS = 32
OWN_FIELDS = ("seed", "task", "lora", "noise_scheduler", "cache", "priority", "timeout", "deadline", "user",
              "request_id", "return_trajectory", "output_type", "preview_every", "latents_every",
              "draft_every")  # fmt: skip
"""Keyword arguments that are ours; every other one goes to the pipeline's ``__call__``."""

_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "request_id": ((str,), "a str"),
    "seed": ((int, NoneType), "an integer, or None to draw one"),
    "task": ((str, NoneType), "a str, or None for what the engine was loaded for"),
    "lora": ((str, list, NoneType), loras.MEANING),
    "noise_scheduler": ((str, Mapping, NoneType), "a class name, {'class': name, **config}, or None"),
    "cache": ((str, Mapping, NoneType), step_caches.MEANING),
    "priority": ((int,), "an integer; lower runs first"),
    "timeout": ((int, float, NoneType), "a number of seconds, or None"),
    "deadline": ((int, float, NoneType), "a number of seconds, or None"),
    "user": ((str, NoneType), "a str, or None"),
    "return_trajectory": ((bool,), "True or False"),
    "output_type": ((str,), "a str as diffusers names it: 'pil', 'np', 'pt' or 'latent'"),
    "preview_every": ((int,), "an integer: every so many steps, 0 is never"),
    "latents_every": ((int,), "an integer: every so many steps, 0 is never"),
    "draft_every": ((int,), "an integer: every so many steps, 0 is never"),
}
"""The types of our fields, and how a message says them. ``bool`` passes for an integer nowhere."""

_STEPS, _STEP_LISTS = "num_inference_steps", ("timesteps", "sigmas")


def _uncounted(params: dict[str, Any]) -> dict[str, Any]:
    """Arguments without a number of steps that is None beside a list of them, as diffusers' documents have it."""
    listed = {
        name.removesuffix(kind)
        for kind in _STEP_LISTS
        for name, value in params.items()
        if name.endswith(kind) and value is not None
    }
    left_out = {f"{stage}{_STEPS}" for stage in listed if params.get(f"{stage}{_STEPS}", 0) is None}
    return {name: value for name, value in params.items() if name not in left_out}


@dataclasses.dataclass(frozen=True, init=False)
class DiffusionRequest:
    """One generation asked for: frozen, and complete enough to be replayed.

    Args:
        prompt: The prompt, or several (one request with several rows), or by frame, with FreeNoise; or None where the
            pipeline needs none.
        params: Everything else goes to the pipeline's ``__call__`` under diffusers' own names
            (``guidance_scale=4.0, num_inference_steps=20, image=...``).

    Attributes:
        prompt: As given.
        params: Keyword arguments for the pipeline's ``__call__``, without ``prompt``.
        request_id: Unique in an engine; drawn if not given.
        seed: ``torch.Generator("cpu").manual_seed(seed)`` for the whole request; drawn if not given and no
            ``generator`` is among ``params``.
        task: What to do with the model: ``"text-to-image"``, ``"image-to-image"``, ``"inpainting"``, ``"controlnet"``,
            as far as the model's family has it (``engine.info.tasks``); None is what the engine was loaded for.
        lora: Adapters for this request alone: ``[(name or path, scale), ...]``, or one name or path, at scale 1. A
            name is one of ``EngineConfig.loras``; a path is a file or folder; ``"owner/name"`` is a hub id.
        noise_scheduler: Class name of a diffusers scheduler for this request, or ``{"class": name, **config}``; a
            class or an object of diffusers' is taken as such.
        cache: Whether steps may be skipped that would hardly change the denoiser's output: ``"easycache"``,
            ``"easycache:0.1"`` (its threshold) or ``{"name": "easycache", "threshold": 0.1, "warm_up": 0.2}``;
            ``"off"``; None is ``EngineConfig.cache``.
        priority: Lower runs first.
        timeout: Seconds from submission, hard: :class:`~steploom.errors.DeadlineExceeded`.
        deadline: Seconds from submission, a hint to the scheduler.
        user: Whom to charge, for fairness.
        return_trajectory: Keep every step's latents and timestep in the output.
        output_type: As diffusers names it: ``"pil"``, ``"np"``, ``"pt"``, ``"latent"``; of a language model ``"text"``
            (which ``"pil"`` means there) or ``"seq"``.
        preview_every: Every how many steps a streamed :class:`StepEvent` carries a preview; 0 is never.
        latents_every: Every how many steps a streamed :class:`StepEvent` carries latents; 0 is never.
        draft_every: Every how many steps the stream of a language model yields a :class:`Draft`; 0 is never.

    Raises:
        InvalidRequest: A field of ours is out of range.
    """

    context: ClassVar[contextvars.Context | None] = None
    """Context variables of whoever asked, for callbacks in this process; they do not travel."""

    prompt: str | list[str] | dict[int, str] | None
    params: Mapping[str, Any]
    request_id: str
    seed: int | None
    task: str | None
    lora: str | list[Any] | None
    noise_scheduler: str | Mapping[str, Any] | None
    cache: str | Mapping[str, Any] | None
    priority: int
    timeout: float | None
    deadline: float | None
    user: str | None
    return_trajectory: bool
    output_type: str
    preview_every: int
    latents_every: int
    draft_every: int

    def __init__(
        self,
        prompt: str | list[str] | dict[int, str] | None = None,
        *,
        seed: int | None = None,
        task: str | None = None,
        lora: loras.Lora | os.PathLike[str] | None = None,
        noise_scheduler: str | Mapping[str, Any] | None = None,
        cache: str | Mapping[str, Any] | step_caches.StepCaching | None = None,
        priority: int = 0,
        timeout: float | None = None,
        deadline: float | None = None,
        user: str | None = None,
        request_id: str | None = None,
        return_trajectory: bool = False,
        output_type: str = "pil",
        preview_every: int = 0,
        latents_every: int = 0,
        draft_every: int = 1,
        **params: Any,
    ) -> None:
        if isinstance(params.get("params"), Mapping):  # dataclasses.replace() gives it as the field that it is
            params = {**params.pop("params"), **params}
        if seed is None and params.get("generator") is None:
            seed = secrets.randbits(SEED_BITS)
        if params.get("generator") is None:
            params.pop("generator", None)
        if seed is not None and hasattr(seed, "__index__") and not isinstance(seed, bool):
            with contextlib.suppress(TypeError):  # arrays and tensors of several
                seed = operator.index(seed)  # numpy's integers
        noise_scheduler = noise_schedulers.by_name(noise_scheduler)
        cache = step_caches.plain(cache)
        if request_id is None:
            request_id = uuid.uuid4().hex[:16]
        lora = loras.listed(lora)
        params = _uncounted({name: given.plain(value) for name, value in params.items()})
        values = dict(locals())
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, given.plain(values[field.name]))
        self._validate()

    @property
    def adapters(self) -> tuple[tuple[str, float], ...]:
        """What ``lora`` asks for: names or paths, and scales."""
        if isinstance(self.lora, str):
            return ((self.lora, 1.0),)
        return tuple((name, scale) for name, scale in self.lora or ())

    @property
    def generators(self) -> list[Any]:
        """What ``generator`` is or holds, each once: several rows may draw from one."""
        one: Any = self.params.get("generator")
        each = cast("list[Any]", one) if isinstance(one, (list, tuple)) else [] if one is None else [one]
        return list({id(generator): generator for generator in each}.values())

    def in_context(self) -> DiffusionRequest:
        """A copy that remembers the context variables of the caller."""
        other = copy.copy(self)
        object.__setattr__(other, "context", contextvars.copy_context())
        return other

    def without_drafts(self) -> DiffusionRequest:
        """A copy that nobody follows step by step."""
        other = copy.copy(self)
        object.__setattr__(other, "draft_every", 0)
        return other

    def with_params(self, **changes: Any) -> DiffusionRequest:
        """A copy with other arguments for the pipeline's ``__call__``."""
        other = copy.copy(self)
        object.__setattr__(other, "params", {**self.params, **changes})
        return other

    def with_id(self, request_id: str) -> DiffusionRequest:
        """A copy under another id, as for a system that has requests of others, too.

        Raises:
            InvalidRequest: It cannot be one.
        """
        other = copy.copy(self)
        object.__setattr__(other, "request_id", request_id)
        other._validate()
        return other

    def mapped(self, change: Callable[[Any], Any]) -> DiffusionRequest:
        """A copy with ``change`` of all that may hold something else; ``generator`` stays as it is."""
        params = {name: value if name == "generator" else change(value) for name, value in self.params.items()}
        other = self.with_params(**params)
        for name in ("prompt", "lora", "noise_scheduler", "cache"):
            object.__setattr__(other, name, change(getattr(self, name)))
        return other

    def _validate(self) -> None:
        for name, (kinds, meaning) in _KINDS.items():
            value = getattr(self, name)  # whatever the caller gave, not what the annotation says
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                raise InvalidRequest(f"{name}={brief(value)}: must be {meaning}", field=name)
            if isinstance(value, int) and name != "seed" and abs(value) > given.MOST:
                raise InvalidRequest(f"{name}={brief(value)}: must fit 64 bits", field=name)
        noise_schedulers.check_settings(self.noise_scheduler)
        loras.check(self.lora)
        for name in ("request_id", "task", "user", "output_type", "lora"):
            given.check(name, getattr(self, name))
        step_caches.parse(self.cache)
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise InvalidRequest(f"seed={brief(self.seed)}: must fit 64 bits", field="seed")
        if self.seed is not None and "generator" in self.params:
            raise InvalidRequest("generator: give either seed or generator, not both", field="generator")
        if not self.request_id or "#" in self.request_id:
            raise InvalidRequest(
                f"request_id={brief(self.request_id)}: must not be empty nor hold '#'", field="request_id"
            )
        for name in ("timeout", "deadline"):
            value = getattr(self, name)
            if value is not None and not value > 0:  # as with nan
                raise InvalidRequest(f"{name}={brief(value)}: must be greater than 0 seconds", field=name)
        for name in ("preview_every", "latents_every", "draft_every"):
            if getattr(self, name) < 0:
                raise InvalidRequest(
                    f"{name}={brief(getattr(self, name))}: must be 0 (never) or more steps", field=name
                )


class Queued(msgspec.Struct, frozen=True, kw_only=True):
    """The request was accepted; ``position`` requests wait before it."""

    request_id: str
    position: int = 0


class StepEvent(msgspec.Struct, frozen=True, kw_only=True):
    """A step of the request is done.

    Attributes:
        request_id: The request's id.
        stage: ``"denoise"``, or the name of a cascade's stage.
        step: Steps done, from 1.
        total_steps: Steps in all, None where the pipeline does not know.
        sigma: Noise level after the step, None where the noise scheduler has none.
        batch_requests: How many requests shared the step's denoiser calls, on average; 0 if its step cache
            answered them.
        skipped_steps: Of the steps done, those that its step cache has answered.
        latents: ``[rows, ...]`` as the pipeline holds them, on the CPU, every ``latents_every`` steps.
        preview: The estimate of the finished image as a PIL image, every ``preview_every`` steps.
    """

    request_id: str
    stage: str = "denoise"
    step: int = 0
    total_steps: int | None = None
    sigma: float | None = None
    batch_requests: float = 1.0
    skipped_steps: int = 0
    latents: Any = None
    preview: Any = None


class Draft(msgspec.Struct, frozen=True, kw_only=True):
    """What a language model's text is likely to go on with; every next one replaces it, and so does a :class:`Commit`.

    Attributes:
        request_id: The request's id.
        text: What follows the text of all commits so far, if nothing changes; of a request of several rows a list. None
            if the pipeline has no tokenizer.
        tokens: Its ids, likewise.
    """

    request_id: str
    text: str | list[str] | None
    tokens: list[Any]


class Commit(msgspec.Struct, frozen=True, kw_only=True):
    """What a language model's text has grown by. It stays: the texts of all commits make the text of the output.

    Attributes:
        request_id: The request's id.
        text: To be appended; of a request of several rows a list. None if the pipeline has no tokenizer.
        tokens: The ids that were settled, likewise; text may lag behind by the bytes of an unfinished character.
        prompt_tokens: How many tokens a row's prompt has, padding included; None if that is not known.
        ended: Whether the model has ended its text with this, by an end token in every row; else there was, or will
            be, no more room.
    """

    request_id: str
    text: str | list[str] | None
    tokens: list[Any]
    prompt_tokens: int | None = None
    ended: bool = False

    def followed_by(self, later: Commit) -> Commit:
        """Both as one."""
        text, tokens = self.text, self.tokens + later.tokens
        if tokens and isinstance(tokens[0], list):
            tokens = [one + other for one, other in zip(self.tokens, later.tokens, strict=True)]
        if isinstance(text, str) and isinstance(later.text, str):
            text += later.text
        elif isinstance(text, list) and isinstance(later.text, list):
            text = [one + other for one, other in zip(text, later.text, strict=True)]
        return msgspec.structs.replace(later, text=text, tokens=tokens)


class Restarted(msgspec.Struct, frozen=True, kw_only=True):
    """The worker died; the request is replayed from its seed as the given attempt (from 1). Its text starts anew."""

    request_id: str
    attempt: int


class Finished(msgspec.Struct, frozen=True, kw_only=True):
    """The last event of a request: its output."""

    request_id: str
    output: DiffusionOutput


class Failed(msgspec.Struct, frozen=True, kw_only=True):
    """The last event of a request that has no output. A stream raises ``error`` instead of yielding this."""

    request_id: str
    error: SteploomError


Event = Queued | StepEvent | Draft | Commit | Restarted | Finished | Failed
